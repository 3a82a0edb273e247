"""Pages and pictures of runs, and their comparison.

charts.py: which metrics are drawn together, with titles and units; a run's PNG pictures
compare.py: the table that compares runs, on the page and in the terminal (its columns: COLUMNS)
document.py: `jaxft report`, one HTML page, its curves as JSON
ranking.py: which of several runs is best: seeds together, differences on the same held-out rows
run_files.py: the files of a run's folder that it shows
sections.py: sections of the page, the reliability diagram of decisions
html_elements.py: HTML that pages are made of: tables, records, folded parts, coloured tokens
statistics.py: paired comparisons over seeds and prompts: intervals, tests, sample sizes
"""
