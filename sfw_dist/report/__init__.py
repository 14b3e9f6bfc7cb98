"""The report of one or more runs: figures, their data, and one self-contained page.

It reads only the files of run folders; it knows nothing of the code that wrote them.
"""
