//! What can be typed.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::admin::query::Net;

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
    /// List virtual servers, pools, members, flows, sessions, policies or certificates
    #[command(after_help = "Examples:\n  \
        smtplb show members\n  \
        smtplb show members mx-tls              those of a pool\n  \
        smtplb show members mx-tls/mx1          one of them\n  \
        smtplb show flows smtps                 those of a virtual server\n  \
        smtplb show flows --member mx-tls/mx1 --phase established --limit 20\n  \
        smtplb show flows --client 198.51.100.0/24 --count\n  \
        smtplb show sessions --json")]
    Show {
        /// What to list.
        kind: Kind,
        /// Only this one: of members `POOL` or `POOL/MEMBER`, of flows and sessions a virtual server.
        name: Option<String>,
        #[command(flatten)]
        flows: FlowFilter,
        #[command(flatten)]
        format: Format,
    },
    /// Read the configuration file again and use it
    ///
    /// All faults are reported as `check` does, and then nothing changes. Connections of what stays do not notice;
    /// what is removed takes nothing new. A connection that is there goes on with what it began with.
    #[command(after_help = "Examples:\n  \
        smtplb reload --dry-run\n  \
        smtplb reload\n\n\
        Exit codes: 0 in use, 78 the file has faults and nothing has changed.")]
    Reload {
        /// Only say what would change.
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        format: Format,
    },
    /// The configuration that is in use, and what the file has else
    #[command(after_help = "Examples:\n  smtplb config show\n  smtplb config diff")]
    Config {
        /// What to do with it.
        #[command(subcommand)]
        what: ConfigVerb,
    },
    /// Give a member nothing new, and let its connections end
    ///
    /// Without a deadline they go on until they end by themselves. At the deadline, passthrough connections are reset
    /// on both sides, so that clients come back at once, and sessions of the proxy end between messages. The state
    /// outlives reload, restart and reboot.
    #[command(after_help = "Examples:\n  \
        smtplb drain mx-tls/mx1\n  \
        smtplb drain mx-tls/mx1 --deadline 60s")]
    Drain(MemberArgs),
    /// Take a member out: nothing new, its connections end at once, and nobody probes it
    #[command(after_help = "Examples:\n  \
        smtplb maint mx-tls/mx1\n  \
        smtplb maint mx-tls/mx1 --deadline 10m     its connections have that long")]
    Maint(MemberArgs),
    /// Let a member serve again after `drain` or `maint`
    #[command(after_help = "Examples:\n  smtplb ready mx-tls/mx1")]
    Ready(ReadyArgs),
    /// Look for what is wrong with this box, and say what to do
    ///
    /// Needs no daemon; asks the kernel for what smtplb uses, and looks at the settings of the box that it depends on.
    #[command(after_help = "Examples:\n  smtplb doctor\n  smtplb doctor --json\n\n\
        Exit codes: 0 nothing is wrong, 1 something is, 77 a privilege to look is missing, 78 the configuration has faults.")]
    Doctor(Format),
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

/// Which flows `show flows` lists.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Of flows")]
pub(super) struct FlowFilter {
    /// Of this virtual server.
    #[arg(long, value_name = "NAME")]
    pub(super) virtual_server: Option<String>,
    /// To this member.
    #[arg(long, value_name = "POOL/MEMBER")]
    pub(super) member: Option<String>,
    /// From this client, or these.
    #[arg(long, value_name = "ADDR[/LEN]")]
    pub(super) client: Option<Net>,
    /// In this phase.
    #[arg(long, value_name = "PHASE", value_parser = ["syn", "established", "fin-client", "fin-member", "closing", "reset"])]
    pub(super) phase: Option<String>,
    /// At most so many.
    #[arg(long, value_name = "N")]
    pub(super) limit: Option<u64>,
    /// Only say how many there are.
    #[arg(long)]
    pub(super) count: bool,
}

impl FlowFilter {
    /// Is nothing chosen?
    pub(super) fn is_empty(&self) -> bool {
        let Self {
            virtual_server,
            member,
            client,
            phase,
            limit,
            count,
        } = self;
        virtual_server.is_none()
            && member.is_none()
            && client.is_none()
            && phase.is_none()
            && limit.is_none()
            && !count
    }
}

/// What to do with the configuration in use.
#[derive(Debug, Clone, Copy, Subcommand)]
pub(super) enum ConfigVerb {
    /// Print it as a file that loads to the same; every key is there, defaults included
    Show(Format),
    /// Say what a reload of the file would change, and change nothing
    Diff(Format),
}

/// A member, and how long its connections have.
#[derive(Debug, Clone, Args)]
pub(super) struct MemberArgs {
    /// The member.
    #[arg(value_name = "POOL/MEMBER", value_parser = member_name)]
    pub(super) member: String,
    /// Until its connections are ended: a whole number and ms, s, m or h.
    #[arg(long, value_name = "TIME", value_parser = deadline)]
    pub(super) deadline: Option<Duration>,
    #[command(flatten)]
    pub(super) format: Format,
}

/// A member that serves again.
#[derive(Debug, Clone, Args)]
pub(super) struct ReadyArgs {
    /// The member.
    #[arg(value_name = "POOL/MEMBER", value_parser = member_name)]
    pub(super) member: String,
    #[command(flatten)]
    pub(super) format: Format,
}

fn member_name(text: &str) -> Result<String, String> {
    match text.split_once('/') {
        Some((pool, member)) if !pool.is_empty() && !member.is_empty() => Ok(text.to_owned()),
        _ => Err("a member is written POOL/MEMBER, as in `smtplb show members`".to_owned()),
    }
}

fn deadline(text: &str) -> Result<Duration, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let scale = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("write for example 60s: a whole number and ms, s, m or h".to_owned()),
    };
    let limit = number.parse::<u64>().ok();
    let limit = limit.and_then(|number| number.checked_mul(scale));
    limit
        .map(Duration::from_millis)
        .filter(|limit| *limit <= LONGEST_DEADLINE)
        .ok_or_else(|| "the longest deadline is 720h".to_owned())
}

/// As the admin API takes it.
const LONGEST_DEADLINE: Duration = Duration::from_secs(30 * 24 * 3600);

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
    /// Certificates that are in use, and when they end.
    Certificates,
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
