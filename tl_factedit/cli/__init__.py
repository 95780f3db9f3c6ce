"""The command line: ``tl-factedit trace|edit|audit|report``, for what people do without writing code.

A file for each command, and one each for what they share: facts and a model from options, statistics, an editor by its
name, and what is printed where. Nothing is measured here that a call of the package doesn't measure.
"""
