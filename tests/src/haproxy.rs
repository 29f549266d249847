//! HAProxy in front of a member's own server: takes PROXY protocol headers, and says whom each names.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{
    lab::Host,
    process::{Process, wait_for_listener},
};

/// What is added to a port: 465 becomes 10465.
pub const OFFSET: u16 = 10_000;

/// An HAProxy in TCP mode. It refuses connections that do not begin with a header.
#[derive(Debug)]
pub struct Haproxy {
    log: PathBuf,
    _process: Process,
}

impl Haproxy {
    /// Starts one on a member, in front of these ports of its.
    ///
    /// # Errors
    /// When HAProxy is not installed or does not come up.
    pub fn start(host: &Host, folder: &Path, ports: &[u16]) -> Result<Self> {
        let config = folder.join(format!("haproxy-{}.cfg", host.name));
        let log = folder.join(format!("haproxy-{}.log", host.name));
        fs::write(&config, configuration(ports))?;
        let mut command = Command::new("haproxy");
        command.arg("-db").arg("-f").arg(&config);
        let name = format!("haproxy-{}", host.name);
        let process = Process::spawn(&host.namespace, &name, &log, &mut command)
            .context("HAProxy is not installed: `cargo xtask setup`")?;
        for port in ports {
            let address = (host.v4, port + OFFSET).into();
            wait_for_listener(&host.namespace, address, Duration::from_secs(20))
                .with_context(|| process.log())?;
        }
        Ok(Self {
            log,
            _process: process,
        })
    }

    /// The clients that headers have named, one for each connection that has ended.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn clients(&self) -> Result<Vec<SocketAddr>> {
        let log = fs::read_to_string(&self.log)?;
        Ok(log
            .lines()
            .filter_map(|line| {
                let (address, port) = line.strip_prefix("client ")?.rsplit_once(' ')?;
                let address: IpAddr = address.parse().ok()?;
                Some(SocketAddr::new(address.to_canonical(), port.parse().ok()?))
            })
            .collect())
    }
}

fn configuration(ports: &[u16]) -> String {
    let mut text = "global
    log stdout format raw local0
    maxconn 1000
defaults
    mode tcp
    log global
    log-format \"client %ci %cp\"
    timeout connect 10s
    timeout client 120s
    timeout server 120s
"
    .to_owned();
    for port in ports {
        text.push_str(&format!(
            "listen smtp{port}
    bind :::{front} v4v6 accept-proxy
    server own 127.0.0.1:{port}
",
            front = port + OFFSET
        ));
    }
    text
}
