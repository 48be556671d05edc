"""Reports: one self-contained HTML page from the files that the stages wrote.

The page shows whether the result is good, and how it was made.
"""
