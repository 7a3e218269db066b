"""What the report is made of: rows of the results folder, statistics, tables, figures. Imports no torch."""
