"""The report of one or more runs: figures, their data, and one self-contained page.

It reads only the files of run folders, and of the code that wrote them knows only the words for prunings.
"""
