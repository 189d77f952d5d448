"""`python -m opferry` is the `opferry` command."""

from opferry.driver.cli import main

main(prog_name="opferry")
