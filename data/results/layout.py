"""data/results/layout.py: columns of cells as Markdown, or aligned in the width of a terminal.

In a narrow terminal the columns of the highest rank are left out; what still has no room continues on an
indented line below its row. Folders, always the last column, go there first. Markdown has all columns.

Public: Column, print_columns, wrapped, print_wrapped, join_parts, left_out_columns,
print_left_out_columns, terminal_width
"""
import sys
from typing import NamedTuple

from data.runtime import run_folder
from data.runtime.run_folder import fit, print_result

GAP = 2                                                 # blanks between columns


class Column(NamedTuple):
    """A column of a table."""
    title: str
    cells: list
    rank: int = 0                                       # the highest is left out first; 0: it always stays
    best: tuple = ()                                    # rows that get an asterisk


def terminal_width():
    """COLUMNS, or the width of the terminal; a file or a pipe has 200."""
    return run_folder.terminal_width(sys.stdout) or 200


def wrapped(text, indent=""):
    """Sentences, the later lines of each indented by one step more; no word is cut."""
    return fit(indent + text, sys.stdout, indent + "  ", terminal_width())


def print_wrapped(text, indent=""):
    print_result(wrapped(text, indent))


def join_parts(head, parts):
    """Parts such as "kl 5.1" behind a head, in as many lines as the terminal needs; no part is broken."""
    lines = [head]
    for part in parts:
        if len(lines[-1]) + GAP + len(part) > terminal_width():
            lines.append("")
        lines[-1] += " " * GAP + part
    return "\n".join(lines)


def print_columns(columns, markdown):
    if markdown:
        print_result("\n".join(markdown_lines(columns)))
    else:
        print_result("\n".join(aligned_lines(columns, terminal_width())))


def markdown_lines(columns):
    """The best cells are bold; a bar inside a cell is escaped."""
    written = []
    for column in columns:
        cells = [cell.replace("|", "\\|") for cell in column.cells]
        bold = [f"**{cell}**" if row in column.best else cell for row, cell in enumerate(cells)]
        written.append([column.title, "---", *bold])
    return ["| " + " | ".join(row) + " |" for row in zip(*written)]


def width_of(column):
    return max(map(len, [column.title, *marked_cells(column)]))


def marked_cells(column):
    """The cells with an asterisk behind the best ones."""
    return [cell + "*" if row in column.best else cell for row, cell in enumerate(column.cells)]


def left_out_columns(columns, limit):
    """The columns that have no room in `limit` characters, the least important first.

    Folders take no room here, because they are wrapped; columns of rank 0 always stay.
    """
    total = sum(width_of(column) + GAP for column in columns if column.title != "folder") - GAP
    dropped = []
    for column in sorted(columns, key=lambda column: -column.rank):
        if total <= limit or not column.rank:
            break
        dropped.append(column)
        total -= width_of(column) + GAP
    return dropped


def print_left_out_columns(titles):
    """Name the columns for which the terminal has no room, if there are any."""
    titles = list(titles)
    if titles:
        print_wrapped(f"Left out, because the terminal has {terminal_width()} columns: {', '.join(titles)}.")


def aligned_lines(columns, limit):
    """Lines of text, without `left_out_columns`; what is still too wide continues on an indented line below
    each row."""
    dropped = left_out_columns(columns, limit)
    parts = [[]]
    used = 0
    for i, column in enumerate(columns):
        if any(column is other for other in dropped):
            continue
        if parts[-1] and used + width_of(column) > limit:
            parts.append([])
            used = GAP
        title = column.title
        if title == "folder" and not parts[-1]:         # folders on a line of their own need no heading
            title = ""
        to_the_left = i == 0 or column.title == "folder"
        width = width_of(column)
        parts[-1].append([cell.ljust(width) if to_the_left else cell.rjust(width)
                          for cell in (title, *marked_cells(column))])
        used += width + GAP
    lines = []
    for row in range(1 + len(columns[0].cells)):
        for number, part in enumerate(parts):
            indent = " " * GAP if number else ""
            lines.append((indent + (" " * GAP).join(cells[row] for cells in part)).rstrip())
    return [line for line in lines if line]
