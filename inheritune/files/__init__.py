"""Files of runs and data: their names, writing to a temporary name and renaming, hashes and markers, the
lock, the Hub's cache.

What the files mean is known elsewhere: this room knows where they lie and that they are whole.
"""
