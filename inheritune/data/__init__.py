"""From documents to batches: readers of files, tokenizers, `prepare`, the order in which a run reads its
windows.

A batch is a pure function of data, seed and step; which model reads it is not known here.
"""
