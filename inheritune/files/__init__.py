"""Files of runs and data: their names, atomic writing, seals, hashes, markers, locks and the Hub's cache.

Other rooms know what the files mean; this room knows their paths and checks that they are complete.
"""
