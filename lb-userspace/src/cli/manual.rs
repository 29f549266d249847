//! `man`: manual pages made from the same text as `--help`.

use anyhow::anyhow;
use clap::{Command, CommandFactory};
use clap_mangen::Man;

use super::args::Cli;
use crate::failure::{Exit, Failure, OrExit};

/// Commands of administrators.
const SECTION: &str = "8";

/// The page of smtplb, or of one of its verbs, in roff.
pub(super) fn page(verb: Option<&str>) -> Result<String, Failure> {
    let mut command = Cli::command();
    // Fills in what verbs inherit: the options of every verb, and their full names.
    command.build();
    let command = match verb {
        None => command,
        Some(verb) => find(&command, verb)?,
    };
    let mut page = Vec::new();
    Man::new(command)
        .section(SECTION)
        .manual("smtplb")
        .render(&mut page)
        .or_exit(Exit::Failed)?;
    String::from_utf8(page).or_exit(Exit::Failed)
}

fn find(command: &Command, verb: &str) -> Result<Command, Failure> {
    command.find_subcommand(verb).cloned().ok_or_else(|| {
        let known: Vec<_> = command.get_subcommands().map(Command::get_name).collect();
        Failure::new(
            Exit::Usage,
            anyhow!(
                "no verb is named \"{verb}\"\n  There are: {}.",
                known.join(", ")
            ),
        )
    })
}
