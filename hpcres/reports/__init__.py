"""One self-contained HTML page from the files that the stages wrote: is the result good, and how was it made?"""
