"""`python -m verl_krpo`: the command line, where its script is not on the path."""

from verl_krpo.cli import main

main()
