"""The report of runs: one HTML page without any other file, see document.py.

document.py: `jaxft report`, one HTML page, its curves as JSON
run_files.py: the files of a run's folder that it shows
sections.py: sections of the page
reliability.py: the reliability diagram of decisions
markup.py: pieces of HTML
page.js: the script that draws curves
page.css: the style
"""
