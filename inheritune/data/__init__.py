"""From documents to batches: readers of files, tokenizers, `prepare`, and the order in which a run reads its
windows.

A batch is a pure function of data, seed and step. No module here knows which model reads it.
"""
