"""Triton kernels for GPUs, each beside its launch, and layers built of them (`layers`).

Floating tensors are float32, float16 or bfloat16; all arithmetic is float32. Sizes need not be multiples of anything.
With TRITON_INTERPRET=1 in the environment before the first import, all of it runs on CPU tensors.
"""
