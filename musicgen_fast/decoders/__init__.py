"""Decoders: the same functions on the same `State`, one implementation per kind of machine.

`torch.py` runs on anything and is the fallback of every other decoder. The protocol (`lanes.Decoder`):

    allocate(rows, capacity) -> Tensor   the KV cache, reusable for any window that fits
    condition(state)                     cross-attention keys and values, once per conditions
    prefill(state, draw=True)            prefix and known columns in one pass, then the first drawn column
    step(*states)                        one column of each: the lanes of one or many batches, in one pass
"""
