//! Configurations for the box of a lab.

use std::{fmt::Write as _, net::IpAddr};

use crate::{
    certs::CertFiles,
    lab::{Family, Host, Lab},
};

/// How a proxy virtual server treats TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientTls {
    /// Plain SMTP.
    None,
    /// TLS from the first byte.
    Implicit,
    /// Mail only after STARTTLS.
    Require,
    /// STARTTLS for those who want it.
    Allow,
}

/// A configuration in the making.
#[derive(Debug, Clone)]
pub struct Config {
    text: String,
}

impl Config {
    /// Names the box's interfaces and the hook.
    pub fn new(lab: &Lab, attach: &str) -> Self {
        let (client, server) = lab.interfaces();
        Self {
            text: format!(
                "[network]\nclient_interfaces = [\"{client}\"]\nserver_interfaces = [\"{server}\"]\nattach = \"{attach}\"\n"
            ),
        }
    }

    /// What a site would have: 465 through the kernel, 587 and 25 through the proxy, for both families, all members
    /// watched once a second.
    pub fn site(lab: &Lab, attach: &str, certificate: &CertFiles) -> Self {
        let mut config = Self::new(lab, attach);
        config.certificate("mail", certificate);
        config.monitor("opens", "tcp");
        config.monitor("answers", "smtp");
        for family in Family::ALL {
            let address = family.virtual_address();
            let tag = tag(family);
            config.pool(lab, &format!("tls-{tag}"), family, 465, Some("opens"));
            config.pool(lab, &format!("plain-{tag}"), family, 25, Some("answers"));
            config.passthrough(
                &format!("smtps-{tag}"),
                address,
                465,
                &format!("tls-{tag}"),
                "automap",
            );
            for (name, port, tls) in [
                ("submission", 587, ClientTls::Require),
                ("smtp", 25, ClientTls::Allow),
            ] {
                config.proxy(
                    &format!("{name}-{tag}"),
                    address,
                    port,
                    &format!("plain-{tag}"),
                    tls,
                );
            }
        }
        config
    }

    /// `[certificate.NAME]`
    pub fn certificate(&mut self, name: &str, files: &CertFiles) -> &mut Self {
        self.add(format_args!(
            "[certificate.{name}]\nchain = \"{}\"\nkey = \"{}\"",
            files.chain.display(),
            files.key.display()
        ))
    }

    /// `[monitor.NAME]`, once a second; one probe decides.
    pub fn monitor(&mut self, name: &str, kind: &str) -> &mut Self {
        self.add(format_args!(
            "[monitor.{name}]\ntype = \"{kind}\"\ninterval = \"1s\"\ntimeout = \"2s\"\nrise = 1\nfall = 1"
        ))
    }

    /// `[pool.NAME]` with every member of the lab on one port.
    pub fn pool(
        &mut self,
        lab: &Lab,
        name: &str,
        family: Family,
        port: u16,
        monitor: Option<&str>,
    ) -> &mut Self {
        self.add(format_args!("[pool.{name}]"));
        if let Some(monitor) = monitor {
            self.line(format_args!("monitor = \"{monitor}\""));
        }
        for member in &lab.members {
            self.line(format_args!(
                "[[pool.{name}.member]]\nname = \"{}\"\naddress = \"{}\"\nport = {port}",
                member.name,
                member.address(family)
            ));
        }
        self
    }

    /// `[pool.NAME]` with one member of the lab on one port.
    pub fn pool_of(&mut self, name: &str, member: &Host, family: Family, port: u16) -> &mut Self {
        self.add(format_args!(
            "[pool.{name}]\nmonitor = \"opens\"\n[[pool.{name}.member]]\nname = \"{}\"\naddress = \"{}\"\nport = {port}",
            member.name,
            member.address(family)
        ))
    }

    /// A passthrough virtual server.
    pub fn passthrough(
        &mut self,
        name: &str,
        address: IpAddr,
        port: u16,
        pool: &str,
        snat: &str,
    ) -> &mut Self {
        self.add(format_args!(
            "[virtual_server.{name}]\naddress = \"{address}\"\nport = {port}\nforward = \"passthrough\"\npool = \"{pool}\"\nsnat = \"{snat}\""
        ))
    }

    /// The passthrough virtual server just written tells the member who the client is.
    pub fn with_header(&mut self) -> &mut Self {
        self.line(format_args!("proxy_protocol = \"v2\""))
    }

    /// A proxy virtual server, plain towards its members; where it speaks TLS, with the certificate `mail`.
    pub fn proxy(
        &mut self,
        name: &str,
        address: IpAddr,
        port: u16,
        pool: &str,
        tls: ClientTls,
    ) -> &mut Self {
        self.add(format_args!(
            "[virtual_server.{name}]\naddress = \"{address}\"\nport = {port}\nforward = \"proxy\"\npool = \"{pool}\""
        ));
        match tls {
            ClientTls::None => self.line(format_args!("client_tls = \"none\"")),
            ClientTls::Implicit => self.line(format_args!(
                "client_tls = \"implicit\"\ncertificates = [\"mail\"]"
            )),
            ClientTls::Require => self.starttls("require"),
            ClientTls::Allow => self.starttls("allow"),
        }
    }

    fn starttls(&mut self, policy: &str) -> &mut Self {
        self.line(format_args!(
            "client_tls = \"starttls\"\nstarttls = \"{policy}\"\ncertificates = [\"mail\"]"
        ))
    }

    /// A table, after an empty line.
    fn add(&mut self, table: std::fmt::Arguments<'_>) -> &mut Self {
        self.line(format_args!("\n{table}"))
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) -> &mut Self {
        let _ = writeln!(self.text, "{line}");
        self
    }

    /// Lines as they are, in the table that was begun last.
    pub fn raw(&mut self, lines: &str) -> &mut Self {
        self.line(format_args!("{lines}"))
    }

    /// As the daemon reads it.
    pub fn text(&self) -> &str {
        &self.text
    }
}

/// `v4` or `v6`, for names.
pub fn tag(family: Family) -> &'static str {
    match family {
        Family::V4 => "v4",
        Family::V6 => "v6",
    }
}
