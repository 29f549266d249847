//! Aligned columns for people.

use std::fmt::Write;

/// Rows under a header; every column as wide as its widest cell.
#[derive(Debug)]
pub(super) struct Table<const N: usize> {
    columns: [Column; N],
    rows: Vec<[String; N]>,
}

/// A column's header and the side its cells lean to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Column {
    /// Words.
    Left(&'static str),
    /// Numbers.
    Right(&'static str),
}

impl<const N: usize> Table<N> {
    pub(super) fn new(columns: [Column; N]) -> Self {
        Self {
            columns,
            rows: Vec::new(),
        }
    }

    pub(super) fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells.map(|cell| printable(&cell)));
    }

    /// The lines, each starting with `indent` and ending in a line feed.
    pub(super) fn render(&self, indent: &str) -> String {
        let widths: [usize; N] = std::array::from_fn(|at| {
            let cells = self.rows.iter().map(|row| row[at].chars().count());
            cells
                .max()
                .unwrap_or(0)
                .max(self.columns[at].header().len())
        });
        let mut out = String::new();
        let headers = self.columns.map(|column| column.header().to_owned());
        for row in std::iter::once(&headers).chain(&self.rows) {
            let mut line = indent.to_owned();
            for ((cell, column), width) in row.iter().zip(self.columns).zip(widths) {
                // Writing to a string cannot fail.
                let _ = match column {
                    Column::Left(_) => write!(line, "{cell:<width$}  "),
                    Column::Right(_) => write!(line, "{cell:>width$}  "),
                };
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

impl Column {
    fn header(self) -> &'static str {
        match self {
            Self::Left(header) | Self::Right(header) => header,
        }
    }
}

/// `text` without anything that a terminal would obey: part of it was said by members.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_do_not_trail() {
        let mut table = Table::new([
            Column::Left("NAME"),
            Column::Right("N"),
            Column::Left("WHY"),
        ]);
        table.row(["a".into(), "1200".into(), String::new()]);
        table.row(["größer".into(), "7".into(), "so".into()]);
        assert_eq!(
            table.render("  "),
            "  NAME       N  WHY\n  a       1200\n  größer     7  so\n"
        );
    }

    #[test]
    fn terminal_commands_are_defused() {
        let mut table = Table::new([Column::Left("REASON")]);
        table.row(["554 \x1b[2J\r\nup".into()]);
        assert_eq!(
            table.render(""),
            "REASON\n554 \u{fffd}[2J\u{fffd}\u{fffd}up\n"
        );
    }
}
