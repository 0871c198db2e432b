"""What nodes cannot do together is said at start, by every rank, in the same words. What goes wrong later keeps
snapshots from being protected, is counted, and `status` says why; when it is over, everything goes on.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.cli.status import find_problems
from ckptd.core.errors import CkptdError, ConfigError, DaemonError, VersionError
from ckptd.core.types import Level
from tests.faults.lab import Fault
from tests.lab.cluster import Cluster
from tests.lab.hosts import SOON, Hosts, all_is_well, misses
from tests.lab.ranks import Crew, Rank, enter
from tests.peers.test_security import Site

MISTAKES = {
    "redundancy": ({"redundancy": "2+2"}, {}, "redundancy='2+2' needs groups of 4 nodes, found 2"),
    "name": ({}, {"b": {"CKPTD_NODE": "a", "LOCAL_RANK": "0"}}, "several nodes are called 'a'"),
    "directory": ({}, {"b": {"CKPTD_RUNTIME_DIR": "a"}}, "nodes 'a' and 'b' have one runtime directory"),
    "address": ({}, {"b": {"CKPTD_ADDRESS": "203.0.113.9"}}, "203.0.113.9:0: cannot be listened at"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(cluster: Cluster, mistake: str) -> None:
    """One wrong thing at a time, on one of two nodes."""
    options, variables, words = MISTAKES[mistake]
    if "CKPTD_RUNTIME_DIR" in variables.get("b", {}):
        variables = {"b": {"CKPTD_RUNTIME_DIR": str(cluster.node("a").runtime)}}
    run = cluster.start("a b", variables=variables, **options)
    first, second = cluster.refused(run)
    assert first == second
    assert first.startswith(f"ConfigError: {words}")


def test_ranks_of_two_versions(cluster: Cluster) -> None:
    newer = Fault("ckptd.protocol.messages:PROTOCOL", "set 2", process="rank1")
    run = cluster.start("a b", faults={"newer": newer})
    assert cluster.refused(run) == [
        "VersionError: rank 0 speaks protocol 1, rank 1 speaks 2: install one version of ckptd on all nodes"
    ] * 2  # fmt: skip


# --- daemons: torch-free, ranks are threads

NEWER = Fault("ckptd.protocol.messages:PROTOCOL", "set 2", process="daemon")
TOKEN, CERTIFICATE = (
    Fault("ckptd.daemon.network:Network._credentials", f"alter tests.lab.wrong:{what}", process="daemon")
    for what in ("token", "certificate")
)
NO_MEMORY = Fault("ckptd.tiers.protection.area:ParityArea.create", "alter tests.lab.wrong:memory", process="daemon")


def _refused(found: list[Rank | Exception], kind: type[CkptdError], *words: str) -> None:
    """Every rank has an error of this kind, in the same words."""
    assert {type(error) for error in found} == {kind}, found
    texts = {str(error).removeprefix("rank 0: ").removeprefix("rank 1: ") for error in found}
    assert len(texts) == 1, texts
    assert all(word in str(found[0]) for word in words), texts


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (NEWER, VersionError, ["protocol 1; this daemon speaks 2"]),
        (TOKEN, ConfigError, ["node 'n0' cannot work with node 'n1': node n1 at", "has another token than epoch"]),
        (CERTIFICATE, ConfigError, ["node 'n0' cannot work with node 'n1': node n1 at", "another certificate"]),
    ],
    ids=["version", "token", "certificate"],
)
def test_another_daemon_at_start(hosts: Hosts, fault: Fault, kind: type[CkptdError], words: list[str]) -> None:
    """The daemon of one of two nodes is of another version, or shows what the others do not know."""
    hosts.plan(SOON)
    here = hosts.make(1)
    hosts.plan({**SOON, "wrong": fault})
    here += hosts.make(1)
    _refused(enter(here), kind, *words)


@pytest.mark.parametrize("other", [True, False], ids=["other", "none"])
def test_certificates_of_another_site(hosts: Hosts, tmp_path: Path, other: bool) -> None:
    """`tls_dir` of one node has certificates of another authority; or is not there."""
    hosts.plan(SOON)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    here = hosts.make(1, CKPTD_TLS_DIR=str(Site(tmp_path / "one").issue("node.example")))
    wrong = Site(tmp_path / "two").issue("node.example") if other else tmp_path / "nowhere"
    here += hosts.make(1, CKPTD_TLS_DIR=str(wrong))
    mixed = ["cannot work with node 'n1': node n1 at", "certificate"]
    words = mixed if other else ["nowhere: ca.pem: No such file"]
    _refused(enter(here), ConfigError, *words)


def test_two_jobs_with_one_name(hosts: Hosts) -> None:
    """The second takes one node of the first, and goes on where that was: every rank of the first is told."""
    here = hosts.make(3)
    first = Crew.enter(here)
    first.snapshot(1)
    second = Crew.enter([here[2], *hosts.make(1)])
    second.check_restored()
    for rank in first.ranks:
        with pytest.raises(DaemonError, match="the job was launched again; two jobs need two names"):
            rank.reaches(Level.SEALED, 2)
    first.vanish()
    second.snapshot(2)
    second.close()
    hosts.end()


def test_memory_that_is_too_little(hosts: Hosts) -> None:
    """`memory=` does not hold one snapshot: every rank is told when its size is known."""
    here = hosts.make(2)
    crew = Crew.enter(here, memory=100_000)
    crew.request(1)
    for rank in crew.ranks:
        with pytest.raises(ConfigError, match=r"2 slots for 1 ranks need \d+ bytes, 0 are available .*memory=100000"):
            rank.reaches(Level.SEALED, 1)
    crew.vanish()


@pytest.mark.parametrize(
    ("fault", "why"),
    [(TOKEN, "has another token than epoch"), (CERTIFICATE, "certificate"), (NEWER, "of protocol")],
    ids=["token", "certificate", "version"],
)
def test_another_daemon_later(hosts: Hosts, fault: Fault, why: str) -> None:
    """A daemon that its keeper has started anew is not what the others know."""
    hosts.plan(SOON)
    here = hosts.make(1)
    hosts.plan({**SOON, "wrong": fault})
    hosts.release("wrong")
    here += hosts.make(1)
    crew = Crew.enter(here)
    crew.snapshot(1)
    hosts.arm("wrong")
    hosts.kill_daemons(here[1])
    crew.ranks[0].request(2)
    misses(here[0], here[1], why=why)
    assert {rank.level(Level.PROTECTED) for rank in crew.ranks} == {1}
    hosts.release("wrong")
    hosts.kill_daemons(here[1])
    if fault is NEWER:  # that rank is told, and ends; so does the launch
        with pytest.raises(VersionError, match="this daemon speaks 2"):
            crew.ranks[1].reaches(Level.PROTECTED, 2)
        crew.vanish()
        crew = Crew.enter(here, resume="must")
        crew.check_restored()
    crew.snapshot(2)
    all_is_well(here, 2)
    crew.close()
    hosts.end()


def test_no_memory_for_parities(hosts: Hosts) -> None:
    """On one of two nodes: snapshots are sealed and not protected, until there is."""
    here = hosts.make(1)
    hosts.plan({"memory": NO_MEMORY})
    here += hosts.make(1)
    crew = Crew.enter(here)
    crew.snapshot(1, Level.SEALED)
    status = here[1].reaches(lambda status: status["failing"], "an encoding to fail")
    (problem,) = find_problems(status)
    assert problem.startswith("protection fails: Encode of step 1 of epoch")
    assert "snapshot memory: " in problem
    assert status["counters"]["protection_errors"] >= 1
    assert {rank.level(Level.PROTECTED) for rank in crew.ranks} == {-1}
    hosts.release("memory")
    for rank in crew.ranks:
        rank.reaches(Level.PROTECTED, 1)
    all_is_well(here, 1)
    crew.close()
    hosts.end()
