"""The commands of `python -m fastinit`. Each module offers add_arguments(parser) and run(arguments) -> exit status.

Private: it may change with any version.
"""
