//! Real Postfix as a member: an instance of its own with its own configuration, queue and mailbox.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
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

/// A Postfix that takes mail for lab.example: 25 in plaintext, 465 with implicit TLS, 587 with STARTTLS.
#[derive(Debug)]
pub struct Postfix {
    name: String,
    inbox: PathBuf,
    process: Process,
}

impl Postfix {
    /// Writes an instance below `folder` and starts it on a member.
    ///
    /// # Errors
    /// When Postfix is not installed or does not come up.
    pub fn start(host: &Host, folder: &Path, cert: &CertFiles) -> Result<Self> {
        let home = folder.join(format!("postfix-{}", host.name));
        let [config, queue, data, mail] =
            ["etc", "queue", "data", "mail"].map(|name| home.join(name));
        for folder in [&config, &queue, &data, &mail] {
            fs::create_dir_all(folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
        }
        // Postfix gives up root before it delivers; its mailbox and its data belong to its own user.
        own(&data)?;
        own(&mail)?;
        fs::set_permissions(&data, fs::Permissions::from_mode(0o700))?;
        let programs = postconf("daemon_directory")?;
        fs::write(
            config.join("main.cf"),
            main_cf(&host.name, &home, &programs, cert),
        )?;
        fs::write(config.join("master.cf"), MASTER_CF)?;
        host.namespace
            .run(Command::new("postfix").arg("-c").arg(&config).arg("check"))
            .context("postfix check")?;

        let log = folder.join(format!("postfix-{}.log", host.name));
        let mut master = Command::new(Path::new(&programs).join("master"));
        // -d: stays in the foreground, so that it can be ended by its id.
        master.arg("-c").arg(&config).arg("-d");
        let process = Process::spawn(&host.namespace, &host.name, &log, &mut master)?;
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
            inbox: mail.join("inbox/new"),
            process,
        })
    }

    /// The master process.
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

fn own(folder: &Path) -> Result<()> {
    let output = Command::new("chown").arg("postfix").arg(folder).output()?;
    ensure!(
        output.status.success(),
        "cannot give {} to postfix: {}",
        folder.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// A compiled-in default.
fn postconf(name: &str) -> Result<String> {
    let output = Command::new("postconf")
        .args(["-d", "-h", name])
        .output()
        .context("Postfix is not installed: `cargo xtask setup`")?;
    ensure!(output.status.success(), "postconf does not know {name}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn main_cf(name: &str, home: &Path, programs: &str, cert: &CertFiles) -> String {
    let home = home.display();
    format!(
        "compatibility_level = 3.6
queue_directory = {home}/queue
data_directory = {home}/data
daemon_directory = {programs}
myhostname = {name}.lab.example
mydestination =
mynetworks =
inet_interfaces = all
inet_protocols = all
maillog_file = {home}/maillog
maillog_file_prefixes = {home}
disable_dns_lookups = yes
smtpd_peername_lookup = no
alias_maps =
alias_database =
local_recipient_maps =
virtual_mailbox_domains = lab.example
virtual_mailbox_base = {home}/mail
virtual_mailbox_maps = static:inbox/
virtual_uid_maps = static:{uid}
virtual_gid_maps = static:{uid}
virtual_minimum_uid = 1
virtual_mailbox_limit = 0
message_size_limit = 52428800
smtpd_relay_restrictions = permit_auth_destination, reject
smtpd_recipient_restrictions =
smtpd_client_connection_count_limit = 0
smtpd_authorized_xclient_hosts = 10.0.0.0/8, [fd00::]/8
smtpd_error_sleep_time = 0
in_flow_delay = 0
smtpd_tls_chain_files = {key}, {chain}
smtpd_tls_security_level = none
smtpd_tls_received_header = yes
",
        uid = postfix_uid(),
        key = cert.key.display(),
        chain = cert.chain.display(),
    )
}

/// The user that Postfix runs as; deliveries are made in its name, so that no other user is needed.
fn postfix_uid() -> String {
    fs::read_to_string("/etc/passwd")
        .unwrap_or_default()
        .lines()
        .find_map(|line| {
            line.strip_prefix("postfix:")?
                .split(':')
                .nth(1)
                .map(str::to_owned)
        })
        .unwrap_or_else(|| "65534".to_owned())
}

/// Behind a PROXY protocol header: 10025 and 10465 as 25 and 465, 10026 as 25 with postscreen before.
const MASTER_CF: &str = "\
10025 inet n - n - - smtpd -o smtpd_upstream_proxy_protocol=haproxy
10465 inet n - n - - smtpd -o smtpd_upstream_proxy_protocol=haproxy -o smtpd_tls_wrappermode=yes -o smtpd_tls_security_level=encrypt
10026 inet n - n - 1 postscreen -o postscreen_upstream_proxy_protocol=haproxy -o postscreen_greet_action=ignore -o postscreen_cache_map=
smtpd pass - - n - - smtpd
dnsblog unix - - n - 0 dnsblog
25 inet n - n - - smtpd
465 inet n - n - - smtpd -o smtpd_tls_wrappermode=yes -o smtpd_tls_security_level=encrypt
587 inet n - n - - smtpd -o smtpd_tls_security_level=may
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
virtual unix - n n - - virtual
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
";
