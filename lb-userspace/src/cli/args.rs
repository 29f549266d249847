//! What can be typed.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

/// A mail load balancer: passthrough in the kernel, STARTTLS and TLS offload in a proxy.
#[derive(Debug, Parser)]
#[command(name = "smtplb", version, after_help = EXAMPLES, after_long_help = LONG_TAIL)]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) paths: Paths,
    #[command(subcommand)]
    pub(super) verb: Verb,
}

/// Where an instance keeps its things; several instances differ in these.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Options of every verb")]
pub(super) struct Paths {
    /// The configuration file.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        default_value = "/etc/smtplb/smtplb.toml"
    )]
    pub(super) config: PathBuf,
    /// The admin socket: `run` makes it, the reading verbs ask there.
    #[arg(
        long,
        global = true,
        value_name = "SOCKET",
        default_value = "/run/smtplb/admin.sock"
    )]
    pub(super) admin: PathBuf,
    /// The bpffs that keeps the kernel plane alive without the daemon; mounted when needed.
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = "/run/smtplb/bpf"
    )]
    pub(super) bpffs: PathBuf,
    /// What has to outlive a reboot.
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        default_value = "/var/lib/smtplb"
    )]
    pub(super) state: PathBuf,
}

/// One verb, one thing done.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Run the daemon, in the foreground
    ///
    /// Loads the configuration, attaches the packet programs, serves the proxy plane and the admin socket,
    /// and says on one line when it serves. Mail through the kernel plane goes on when it ends, stops or is
    /// killed; the next one takes over what it finds.
    #[command(after_help = "Examples:\n  \
        smtplb run\n  \
        smtplb run --config ./smtplb.toml --admin /tmp/lb.sock\n  \
        smtplb run --kernel-log")]
    Run {
        /// Log what the packet programs say; costs speed, for looking into a fault.
        #[arg(long)]
        kernel_log: bool,
    },
    /// Check a configuration file
    ///
    /// Reports every fault with file:line:column, what follows from it and what to do. Needs no daemon and no
    /// privilege but to read the files.
    #[command(after_help = "Examples:\n  \
        smtplb check\n  \
        smtplb check ./smtplb.toml\n  \
        smtplb check --json ./new.toml && cp ./new.toml /etc/smtplb/smtplb.toml\n\n\
        Exit codes: 0 valid, 78 invalid or not readable, 77 reading needs a privilege.")]
    Check {
        /// The file; by default the one of --config.
        file: Option<PathBuf>,
        #[command(flatten)]
        format: Format,
    },
    /// The daemon at a glance: planes, virtual servers, pools and members
    #[command(after_help = "Examples:\n  smtplb status\n  smtplb status --json | jq .uptime_s")]
    Status(Format),
    /// List virtual servers, pools, members, flows, sessions or policies
    #[command(after_help = "Examples:\n  \
        smtplb show members\n  \
        smtplb show members mx-tls              those of a pool\n  \
        smtplb show members mx-tls/mx1          one of them\n  \
        smtplb show flows smtps                 those of a virtual server\n  \
        smtplb show policy edge                 its rules with their counters\n  \
        smtplb show sessions --json")]
    Show {
        /// What to list.
        kind: Kind,
        /// Only this one: of members `POOL` or `POOL/MEMBER`, of flows and sessions a virtual server.
        name: Option<String>,
        #[command(flatten)]
        format: Format,
    },
    /// Say what would become of a connection: rule, virtual server, member
    ///
    /// Runs the first packet of such a connection through the loaded programs without sending it. Nothing is
    /// counted, logged or changed.
    #[command(after_help = "Examples:\n  \
        smtplb explain --from 198.51.100.7 --to 203.0.113.10:25\n  \
        smtplb explain --from [2001:db8::7]:40000 --to [2001:db8::25]:465 --interface eth0 --vlan 10 --json")]
    Explain {
        /// The client; without a port any.
        #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = client_address)]
        from: SocketAddr,
        /// The virtual address and port.
        #[arg(long, value_name = "ADDRESS:PORT")]
        to: SocketAddr,
        /// Where it comes in; by default the first client interface.
        #[arg(long, value_name = "INTERFACE")]
        interface: Option<String>,
        /// With this VLAN tag.
        #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4094))]
        vlan: Option<u16>,
        #[command(flatten)]
        format: Format,
    },
    /// Counters: what was refused and why, what happened, what was carried
    ///
    /// Text leaves out counters that are 0; --json has them all. Counters outlive the daemon.
    #[command(after_help = "Examples:\n  smtplb stats\n  smtplb stats --json | jq .drops")]
    Stats(Format),
    /// One line for a monitoring system
    ///
    /// CRITICAL when a virtual server has no member up, WARNING when some member is down, UNKNOWN when the
    /// daemon cannot be asked, else OK. Behind the bar stand the numbers (perfdata).
    #[command(after_help = "Examples:\n  smtplb health\n\n\
        Exit codes (monitoring plugins): 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.")]
    Health(Format),
    /// Print a completion script for a shell
    #[command(after_help = "Examples:\n  \
        smtplb completions bash > /etc/bash_completion.d/smtplb\n  \
        smtplb completions zsh > /usr/share/zsh/site-functions/_smtplb")]
    Completions {
        /// Which shell.
        shell: Shell,
    },
    /// Print the manual page, of smtplb or of a verb
    #[command(after_help = "Examples:\n  \
        smtplb man > /usr/share/man/man8/smtplb.8\n  \
        smtplb man show > /usr/share/man/man8/smtplb-show.8")]
    Man {
        /// Of this verb.
        verb: Option<String>,
    },
}

/// The port of a client that was not told: an ephemeral one.
const ANY_PORT: u16 = 49_152;

fn client_address(text: &str) -> Result<SocketAddr, String> {
    let address = text
        .parse::<IpAddr>()
        .map(|address| SocketAddr::new(address, ANY_PORT));
    address
        .or_else(|_| text.parse())
        .map_err(|_| "neither an address nor address:port (IPv6 in brackets)".to_owned())
}

/// For people, or for programs.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct Format {
    /// Print JSON, the stable contract; text may change.
    #[arg(long)]
    pub(super) json: bool,
}

/// What `show` lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
    /// Addresses and ports that mail comes to.
    VirtualServers,
    /// Groups of members, with their state.
    Pools,
    /// Mail servers, with state and traffic of both planes.
    Members,
    /// Connections of the kernel plane.
    Flows,
    /// Connections of the proxy plane.
    Sessions,
    /// Policies: their rules, and how often each has matched.
    Policy,
}

const EXAMPLES: &str = "\
Examples:
  smtplb check /etc/smtplb/smtplb.toml
  smtplb run
  smtplb status
  smtplb show members --json

`smtplb --help` also tells the exit codes.";

const LONG_TAIL: &str = "\
Examples:
  smtplb check /etc/smtplb/smtplb.toml    is it valid?
  smtplb run                              serve, in the foreground
  smtplb status                           how is it?
  smtplb show members --json              for programs

Exit codes:
   0  done
   1  failed
   2  the command line is wrong
  69  no daemon answers on the admin socket
  75  failed for now, try again
  77  a privilege is missing; the message names it
  78  the configuration, or a file it names, is invalid
  `health` ends with 0 OK, 1 WARNING, 2 CRITICAL or 3 UNKNOWN instead.";
