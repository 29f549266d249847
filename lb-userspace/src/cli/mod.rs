//! The command line: parses it, does what a verb says, and ends with the documented exit code.

mod args;
mod change;
mod check;
mod doctor;
mod flows;
mod health;
mod manual;
mod policy;
mod read;
mod table;
mod text;
mod units;

#[cfg(test)]
mod tests;

use std::{
    ffi::OsString,
    io::{self, Write},
    process::ExitCode,
};

use args::{Cli, ConfigVerb, Kind, MemberArgs, Paths, Verb};
use clap::{CommandFactory, Parser};

use crate::{
    admin::{client::Client, view::Question},
    daemon::RunOptions,
    failure::{Exit, Failure, OrExit},
    pool::Admin,
};

/// The daemon, as the command line sees it: returns when it is told to stop.
pub type Run = fn(RunOptions) -> Result<(), Failure>;

/// The whole program; `run` is what the verb of that name calls.
pub fn main(run: Run) -> ExitCode {
    let ended = end(std::env::args_os(), run, &mut io::stdout());
    // Into a closed pipe nothing can be said, and nobody is left to mind.
    let _ = io::stderr().write_all(ended.err.as_bytes());
    match io::stdout().write_all(ended.out.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            let _ = writeln!(io::stderr(), "smtplb: cannot write the answer: {error}");
            ExitCode::from(Exit::Failed.code())
        }
        _ => ExitCode::from(ended.code),
    }
}

/// How a command ended: its code and what it has to say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Ended {
    code: u8,
    out: String,
    err: String,
}

/// `out` takes what is too long to be held; it comes before what is returned.
fn end(args: impl IntoIterator<Item = OsString>, run: Run, out: &mut dyn Write) -> Ended {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => return misread(&error),
    };
    execute(cli, run, out).unwrap_or_else(|failure| Ended {
        code: failure.code.code(),
        err: format!("smtplb: {failure}\n"),
        ..Ended::default()
    })
}

/// What clap has to say instead of a command line: a mistake, or the help or version that was asked for.
fn misread(error: &clap::Error) -> Ended {
    let said = error.render().to_string();
    if error.use_stderr() {
        Ended {
            code: Exit::Usage.code(),
            err: said,
            ..Ended::default()
        }
    } else {
        Ended {
            out: said,
            ..Ended::default()
        }
    }
}

fn execute(cli: Cli, run: Run, long: &mut dyn Write) -> Result<Ended, Failure> {
    let client = Client::new(&cli.paths.admin);
    let out = match cli.verb {
        Verb::Run { kernel_log } => {
            let Paths {
                config,
                admin,
                bpffs,
                state,
            } = cli.paths;
            run(RunOptions {
                config,
                admin,
                bpffs,
                state,
                kernel_log,
            })?;
            String::new()
        }
        Verb::Check { file, format } => {
            return check::check(file.as_deref().unwrap_or(&cli.paths.config), format);
        }
        Verb::Status(format) => read::status(&client, format)?,
        Verb::Show {
            kind: Kind::Flows,
            name,
            flows,
            format,
        } => flows::show(&client, name, flows, format, long)?,
        Verb::Show {
            kind,
            name,
            flows,
            format,
        } => {
            if !flows.is_empty() {
                return Ok(flows::only_of_flows());
            }
            read::show(&client, kind, name.as_deref(), format)?
        }
        Verb::Reload { dry_run, format } => change::reload(&client, dry_run, format)?,
        Verb::Config {
            what: ConfigVerb::Show(format),
        } => change::config_show(&client, format)?,
        Verb::Config {
            what: ConfigVerb::Diff(format),
        } => change::reload(&client, true, format)?,
        Verb::Drain(member) => change::member(&client, Admin::Drain, &member)?,
        Verb::Maint(member) => change::member(&client, Admin::Maint, &member)?,
        Verb::Ready(ready) => {
            let member = MemberArgs {
                member: ready.member,
                deadline: None,
                format: ready.format,
            };
            change::member(&client, Admin::Ready, &member)?
        }
        Verb::Doctor(format) => return doctor::doctor(&cli.paths, format),
        Verb::Explain {
            from,
            to,
            interface,
            vlan,
            format,
        } => {
            let question = Question {
                from,
                to,
                interface,
                vlan,
            };
            read::explain(&client, &question, format)?
        }
        Verb::Stats(format) => read::stats(&client, format)?,
        Verb::Health(format) => {
            let health = health::ask(&client);
            let out = if format.json {
                read::json(&health)?
            } else {
                health.line()
            };
            return Ok(Ended {
                code: health.state as u8,
                out,
                ..Ended::default()
            });
        }
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "smtplb", &mut script);
            String::from_utf8(script).or_exit(Exit::Failed)?
        }
        Verb::Man { verb } => manual::page(verb.as_deref())?,
    };
    Ok(Ended {
        out,
        ..Ended::default()
    })
}
