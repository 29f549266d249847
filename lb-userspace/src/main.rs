//! The smtplb binary: the command line, with the daemon behind `run`.

use std::process::ExitCode;

fn main() -> ExitCode {
    lb_userspace::cli::main(lb_userspace::daemon::run)
}
