"""`ckptd diff SOURCE TARGET`: in what two checkpoints differ; exit status 0 only if in nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ckptd.cli import options, output
from ckptd.cli.progress import progress_bar

if TYPE_CHECKING:
    from ckptd.operations.diff import Difference


def command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=options.CHECKPOINT_HELP)],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The checkpoint to compare it with.")],
    json: options.Json = False,
) -> None:
    """Compare two checkpoints: keys, dtypes, shapes, bytes, objects."""
    from ckptd.operations.diff import diff
    from ckptd.tiers.store import open_checkpoint

    with open_checkpoint(source) as before, open_checkpoint(target) as after, progress_bar("comparing") as progress:
        difference = diff(before, after, progress)
    if json:
        output.print_json(_document(difference))
    else:
        _print(difference)
    if not difference.equal:
        raise typer.Exit(1)


def _document(difference: Difference) -> dict[str, Any]:
    return {
        "equal": difference.equal,
        "compared": difference.compared,
        "only_source": difference.only_source,
        "only_target": difference.only_target,
        "changed": [
            {
                "key": change.key,
                "source": {"dtype": change.source_dtype, "shape": list(change.source_shape)},
                "target": {"dtype": change.target_dtype, "shape": list(change.target_shape)},
            }
            for change in difference.changed
        ],
        "tensors": [
            {
                "key": tensor.key,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "elements": tensor.elements,
                "max_abs": output.json_number(tensor.max_abs),
                "ranks": tensor.ranks,
            }
            for tensor in difference.tensors
        ],
        "objects": [
            {"path": value.path, "source": value.source, "target": value.target} for value in difference.objects
        ],
    }


def _print(difference: Difference) -> None:
    for key in difference.only_source:
        output.say(f"only in source  {output.printable(key)}")
    for key in difference.only_target:
        output.say(f"only in target  {output.printable(key)}")
    for change in difference.changed:
        output.say(
            f"changed         {output.printable(change.key)}: {change.source_dtype} {list(change.source_shape)} -> "
            f"{change.target_dtype} {list(change.target_shape)}"
        )
    for tensor in difference.tensors:
        largest = "" if tensor.max_abs is None else f", max abs difference {tensor.max_abs:.6g}"
        ranks = f", own values of ranks {tensor.ranks}" if tensor.ranks else ""
        output.say(
            f"bytes differ    {output.printable(tensor.key)}: "
            f"{output.format_count(tensor.elements, 'element')} of {tensor.dtype} {list(tensor.shape)}{largest}{ranks}"
        )
    for value in difference.objects:
        before, after = (output.printable("(absent)" if v is None else v) for v in (value.source, value.target))
        output.say(f"object differs  {output.printable(value.path)}: {before} -> {after}")
    if difference.equal:
        output.say(f"equal: {output.format_count(difference.compared, 'tensor')} and all objects")
