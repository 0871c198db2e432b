"""The side of ckptd that lives in the training process. With interop and dcp, the only code that imports torch."""
