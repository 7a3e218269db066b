"""Studies: claims of the Shiva-DiT paper that need no sweep, each put to the test by one command.

`python -m harness.study NAME` measures, then writes report.md, data.json and figures. A study is a module with
`measure(seeds, store)` -> JSON-able data, `report(data)` -> markdown and `figures(data)` -> {file name: figure}; the last two
read nothing but the data.
"""
