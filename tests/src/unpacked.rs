//! Mail servers that are unpacked beside the system and not installed: each runs in a view of the files where it is.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{
    certs::CertFiles,
    lab::Host,
    mailbox,
    process::{Process, wait_for_listener},
    sink::Arrival,
};

/// The user and group of everything that these servers do without root.
const UID: u32 = 64_001;
/// Names that the servers look for.
const USERS: [&str; 4] = ["opensmtpd", "opensmtpq", "Debian-exim", "inbox"];

/// Which one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// OpenSMTPD.
    OpenSmtpd,
    /// Exim.
    Exim,
}

/// A server that takes mail for lab.example: 25 in plaintext, 465 with implicit TLS, 587 with STARTTLS.
#[derive(Debug)]
pub struct Unpacked {
    name: String,
    inbox: PathBuf,
    process: Process,
}

impl Unpacked {
    /// Writes an instance below `folder` and starts it on a member.
    ///
    /// # Errors
    /// When it is not unpacked or does not come up.
    pub fn start(kind: Kind, host: &Host, folder: &Path, cert: &CertFiles) -> Result<Self> {
        let name = match kind {
            Kind::OpenSmtpd => "opensmtpd",
            Kind::Exim => "exim",
        };
        let home = folder.join(format!("{name}-{}", host.name));
        let instance = Instance {
            name,
            host,
            home,
            cert,
        };
        instance.prepare()?;
        let (config, arguments) = match kind {
            Kind::OpenSmtpd => (("smtpd.conf", instance.smtpd_conf()), "/usr/sbin/smtpd -d"),
            Kind::Exim => (
                ("exim4/exim4.conf", instance.exim_conf()),
                "/usr/sbin/exim4 -bdf -q1m",
            ),
        };
        fs::write(instance.home.join("etc").join(config.0), config.1)?;
        let log = folder.join(format!("{name}-{}.log", host.name));
        let mut command = instance.view(arguments)?;
        let process = Process::spawn(&host.namespace, &host.name, &log, &mut command)?;
        for port in [25, 465, 587] {
            wait_for_listener(
                &host.namespace,
                (host.v4, port).into(),
                Duration::from_secs(20),
            )
            .with_context(|| process.log())?;
        }
        Ok(Self {
            name: host.name.clone(),
            inbox: instance.home.join("mail/inbox/new"),
            process,
        })
    }

    /// The server's first process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// What lies in its mailbox.
    ///
    /// # Errors
    /// When the mailbox cannot be read.
    pub fn arrivals(&self) -> Result<Vec<Arrival>> {
        mailbox::arrivals(&self.name, &self.inbox)
    }
}

/// One server's files.
struct Instance<'a> {
    /// The folder that it is unpacked into.
    name: &'static str,
    host: &'a Host,
    home: PathBuf,
    cert: &'a CertFiles,
}

impl Instance<'_> {
    fn prepare(&self) -> Result<()> {
        let home = &self.home;
        for part in [
            "etc/exim4",
            "var/lib/opensmtpd/empty",
            "var/spool",
            "var/run",
            "work",
            "mail",
            "log",
            "tls",
            "queue",
        ] {
            let part = home.join(part);
            fs::create_dir_all(&part).with_context(|| format!("cannot make {}", part.display()))?;
        }
        for part in ["mail", "log", "tls", "queue"] {
            chown(home.join(part), Some(UID), Some(UID))?;
        }
        for (file, line) in [
            ("passwd", "x:64001:64001::/nonexistent:/bin/sh"),
            ("group", "x:64001:"),
        ] {
            let mut text = fs::read_to_string(Path::new("/etc").join(file))?;
            for user in USERS {
                text.push_str(&format!("{user}:{line}\n"));
            }
            fs::write(home.join("etc").join(file), text)?;
        }
        // Nobody answers questions in the lab: a server that asks for a client's name would wait.
        fs::write(
            home.join("etc/resolv.conf"),
            "lookup file\nnameserver 127.0.0.1\n",
        )?;
        for (from, to) in [(&self.cert.chain, "chain.pem"), (&self.cert.key, "key.pem")] {
            let to = home.join("tls").join(to);
            fs::copy(from, &to)?;
            // Exim has given up root when it reads them; OpenSMTPD takes no key that others own.
            let owner = if self.name == "exim" { UID } else { 0 };
            chown(&to, Some(owner), Some(owner))?;
        }
        Ok(())
    }

    /// The command, in a view of its own: the system's files, what was unpacked and this instance's own above them.
    fn view(&self, command: &str) -> Result<Command> {
        let unpacked = cache()?.join("mtas").join(self.name).join("usr");
        ensure!(
            unpacked.is_dir(),
            "{} is not there: `cargo xtask setup`",
            unpacked.display()
        );
        let (usr, home) = (unpacked.display(), self.home.display());
        let script = format!(
            "set -e\n\
             mount -t overlay -o lowerdir={usr}:/usr usr /usr\n\
             mount -t overlay -o lowerdir={home}/etc:/etc etc /etc\n\
             mount -t overlay -o lowerdir=/var,upperdir={home}/var,workdir={home}/work var /var\n\
             exec {command}"
        );
        let mut view = Command::new("unshare");
        view.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
        Ok(view)
    }

    fn smtpd_conf(&self) -> String {
        let (home, name) = (self.home.display(), &self.host.name);
        format!(
            "pki mail cert \"{home}/tls/chain.pem\"\n\
             pki mail key \"{home}/tls/key.pem\"\n\
             smtp max-message-size \"100M\"\n\
             table inbox {{ \"@\" = \"inbox\" }}\n\
             listen on 0.0.0.0 port 25 hostname {name}.lab.example\n\
             listen on :: port 25 hostname {name}.lab.example\n\
             listen on 0.0.0.0 port 465 smtps pki mail hostname {name}.lab.example\n\
             listen on :: port 465 smtps pki mail hostname {name}.lab.example\n\
             listen on 0.0.0.0 port 587 tls pki mail hostname {name}.lab.example\n\
             listen on :: port 587 tls pki mail hostname {name}.lab.example\n\
             action \"keep\" maildir \"{home}/mail/inbox\" virtual <inbox>\n\
             match from any for domain \"lab.example\" action \"keep\"\n"
        )
    }

    fn exim_conf(&self) -> String {
        let (home, name) = (self.home.display(), &self.host.name);
        format!(
            "primary_hostname = {name}.lab.example\n\
             spool_directory = {home}/queue\n\
             log_file_path = {home}/log/%slog\n\
             pid_file_path = {home}/log/exim.pid\n\
             daemon_smtp_ports = 25 : 465 : 587\n\
             tls_on_connect_ports = 465\n\
             local_interfaces = <; 0.0.0.0 ; ::0\n\
             tls_advertise_hosts = ${{if eq{{$received_port}}{{587}}{{*}}}}\n\
             tls_certificate = {home}/tls/chain.pem\n\
             tls_privatekey = {home}/tls/key.pem\n\
             message_size_limit = 100M\n\
             smtp_accept_max = 1000\n\
             smtp_accept_queue_per_connection = 0\n\
             smtp_accept_max_per_connection = 1000\n\
             host_lookup =\n\
             rfc1413_query_timeout = 0s\n\
             dns_dnssec_ok = 0\n\
             keep_environment =\n\
             acl_smtp_rcpt = take\n\
             acl_smtp_data = take\n\
             begin acl\n\
             take:\n  accept\n\
             begin routers\n\
             all:\n  driver = accept\n  domains = lab.example\n  transport = inbox\n\
             begin transports\n\
             inbox:\n  driver = appendfile\n  maildir_format\n  directory = {home}/mail/inbox\n  create_directory\n  \
             user = inbox\n  group = inbox\n  return_path_add\n  delivery_date_add = false\n"
        )
    }
}

/// Where `cargo xtask setup` unpacks them.
fn cache() -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|folder| folder.is_absolute())
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
    Ok(cache
        .context("neither XDG_CACHE_HOME nor HOME is set")?
        .join("smtplb"))
}
