"""Other people's files and ours: safetensors, torch.save files, directories of torch.distributed.checkpoint.

Importing makes an origin of chunks (`operations.reshard.Origin`) out of foreign files; exporting streams a checkpoint
into them. Both in bounded memory, piece by piece. Foreign files are read with suspicion: limits before allocation,
nothing executed. Only what writes pickles for torch to read imports torch.
"""
