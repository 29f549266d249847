//! A generation in the words of the file: what `config show` prints and what two generations are compared by.
//!
//! Every key is written, defaults included, so that the text loads to the same generation whatever the defaults become.

mod policy;
mod session;
mod tls;

use std::{fmt::Write as _, path::Path, time::Duration};

use super::{
    Attach, Forward, Generation, Method, Mode, Monitor, OnDown, Pool, PortRange, Probe, Snat,
    SnatPool, VirtualServer,
};

/// One table of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// What people call it: `pool "msa"`.
    pub object: String,
    /// The line that begins it, without brackets; empty for the keys above every table.
    header: String,
    /// One of several: `[[…]]`.
    repeated: bool,
    /// Keys and values, as TOML writes them.
    pub keys: Vec<(&'static str, String)>,
    /// What no key says: what a file held that a key names. Comments in the printed file.
    pub notes: Vec<(&'static str, String)>,
}

impl Table {
    fn new(object: impl Into<String>, header: impl Into<String>) -> Self {
        Self {
            object: object.into(),
            header: header.into(),
            repeated: false,
            keys: Vec::new(),
            notes: Vec::new(),
        }
    }

    fn word(&mut self, key: &'static str, value: &str) {
        self.keys.push((key, quoted(value)));
    }

    fn number(&mut self, key: &'static str, value: impl ToString) {
        self.keys.push((key, value.to_string()));
    }

    fn list<'a>(&mut self, key: &'static str, values: impl Iterator<Item = &'a str>) {
        let values: Vec<_> = values.map(quoted).collect();
        self.keys.push((key, format!("[{}]", values.join(", "))));
    }
}

/// The whole generation as a file that loads to the same one.
pub fn text(generation: &Generation) -> String {
    let mut text = String::new();
    for table in tables(generation) {
        if !text.is_empty() {
            text.push('\n');
        }
        let (open, close) = if table.repeated {
            ("[[", "]]")
        } else {
            ("[", "]")
        };
        if !table.header.is_empty() {
            let _ = writeln!(text, "{open}{}{close}", table.header);
        }
        for (key, value) in &table.keys {
            let _ = writeln!(text, "{key} = {value}");
        }
        for (what, value) in &table.notes {
            let _ = writeln!(text, "# {what}: {value}");
        }
    }
    text
}

/// Every table, in the order of the printed file.
pub fn tables(generation: &Generation) -> Vec<Table> {
    let mut top = Table::new("the file", "");
    top.word(
        "mode",
        match generation.mode {
            Mode::Mixed => "mixed",
            Mode::PassthroughOnly => "passthrough-only",
        },
    );
    let mut tables = vec![
        top,
        network(generation),
        log(generation),
        timeouts(generation),
        session::sessions(&generation.session),
    ];
    tables.extend(
        generation
            .virtual_servers
            .iter()
            .map(|server| virtual_server(server)),
    );
    tables.extend(generation.snat_pools.values().map(|pool| snat_pool(pool)));
    for certificate in generation.certificates.values() {
        let mut table = named("certificate", "certificate", &certificate.name);
        table.word("chain", &path(&certificate.chain));
        table.word("key", &path(&certificate.key));
        tables.push(table);
    }
    for shared in generation.pools.values() {
        pool(shared, &mut tables);
    }
    tables.extend(generation.monitors.values().map(|shared| monitor(shared)));
    for shared in generation.policies.values() {
        policy::policy(shared, &mut tables);
    }
    tables
}

fn network(generation: &Generation) -> Table {
    let network = &generation.network;
    let mut table = Table::new("network", "network");
    for (key, names) in [
        ("client_interfaces", &network.client_interfaces),
        ("server_interfaces", &network.server_interfaces),
    ] {
        table.list(key, names.iter().map(String::as_str));
    }
    table.word(
        "attach",
        match network.attach {
            Attach::Auto => "auto",
            Attach::Xdp => "xdp",
            Attach::XdpGeneric => "xdp-generic",
            Attach::Tc => "tc",
        },
    );
    table.number("max_flows", network.max_flows);
    if let Some(ports) = network.snat_ports {
        table.word("snat_ports", &range(ports));
    }
    ranges(&mut table, "snat_exclude", &network.snat_exclude);
    // An empty list would be an error; without one every VLAN is meant.
    if !network.vlans.is_empty() {
        let vlans: Vec<_> = network.vlans.iter().map(ToString::to_string).collect();
        table
            .keys
            .push(("vlans", format!("[{}]", vlans.join(", "))));
    }
    policy::guard(&mut table, &network.guard);
    table
}

fn log(generation: &Generation) -> Table {
    let mut table = Table::new("log", "log");
    table.number("flows", generation.log.flows);
    table.number("flows_per_second", generation.log.flows_per_second);
    table
}

fn timeouts(generation: &Generation) -> Table {
    let timeouts = &generation.timeouts;
    let mut table = Table::new("timeouts", "timeouts");
    for (key, value) in [
        ("syn", timeouts.syn),
        ("established", timeouts.established),
        ("half_closed", timeouts.half_closed),
        ("closing", timeouts.closing),
    ] {
        table.word(key, &duration(value));
    }
    table
}

fn snat_pool(pool: &SnatPool) -> Table {
    let mut table = named("SNAT pool", "snat", &pool.name);
    let addresses: Vec<_> = pool.addresses.iter().map(ToString::to_string).collect();
    table.list("addresses", addresses.iter().map(String::as_str));
    if let Some(ports) = pool.ports {
        table.word("ports", &range(ports));
    }
    ranges(&mut table, "exclude", &pool.exclude);
    table
}

fn snat_word(snat: &Snat) -> &str {
    match snat {
        Snat::None => "none",
        Snat::Automap => "automap",
        Snat::Pool(name) => name,
    }
}

fn range(range: PortRange) -> String {
    format!("{}-{}", range.first, range.last)
}

fn ranges(table: &mut Table, key: &'static str, all: &[PortRange]) {
    let all: Vec<_> = all.iter().map(|one| range(*one)).collect();
    table.list(key, all.iter().map(String::as_str));
}

fn virtual_server(server: &VirtualServer) -> Table {
    let mut table = named("virtual server", "virtual_server", &server.name);
    let host = match server.at.is_prefix() {
        true => format!("{}/{}", server.at.address, server.at.length),
        false => server.at.address.to_string(),
    };
    table.word("address", &host);
    match server.at.ports[..] {
        [(from, to)] if from == to => table.number("port", from),
        _ => {
            let ports = server.at.ports.iter().map(|(from, to)| match from == to {
                true => from.to_string(),
                false => quoted(&format!("{from}-{to}")),
            });
            let ports: Vec<_> = ports.collect();
            table.number("port", format!("[{}]", ports.join(", ")));
        }
    }
    policy::guard(&mut table, &server.guard);
    match &server.forward {
        Forward::Passthrough {
            snat,
            proxy_protocol,
        } => {
            table.word("forward", "passthrough");
            table.word("snat", snat_word(snat));
            if *proxy_protocol {
                table.word("proxy_protocol", "v2");
            }
        }
        Forward::Proxy {
            client_tls,
            server_tls,
            xclient,
            terms,
        } => {
            table.word("forward", "proxy");
            tls::client(&mut table, client_tls);
            tls::server(&mut table, server_tls);
            table.number("xclient", xclient);
            session::terms(&mut table, terms);
        }
    }
    table.word("pool", &server.pool);
    table
}

fn pool(pool: &Pool, tables: &mut Vec<Table>) {
    let mut table = named("pool", "pool", &pool.name);
    table.word(
        "method",
        match pool.method {
            Method::LeastConnections => "least-connections",
            Method::RoundRobin => "round-robin",
        },
    );
    if let Some(monitor) = &pool.monitor {
        table.word("monitor", monitor);
    }
    table.word(
        "on_down",
        match pool.on_down {
            OnDown::Leave => "leave",
            OnDown::Reset => "reset",
        },
    );
    tables.push(table);
    for member in &pool.members {
        let mut table = Table::new(
            format!("member {:?}", format!("{}/{}", pool.name, member.name)),
            format!("pool.{}.member", bare(&pool.name)),
        );
        table.repeated = true;
        // A name that the address gives cannot be written: it has a colon.
        if *member.name != *member.address.to_string() {
            table.word("name", &member.name);
        }
        table.word("address", &member.address.ip().to_string());
        table.number("port", member.address.port());
        tables.push(table);
    }
}

fn monitor(monitor: &Monitor) -> Table {
    let mut table = named("monitor", "monitor", &monitor.name);
    match &monitor.probe {
        Probe::Tcp => table.word("type", "tcp"),
        Probe::Smtp { helo } => {
            table.word("type", "smtp");
            table.word("helo", helo);
        }
    }
    table.word("interval", &duration(monitor.interval));
    table.word("timeout", &duration(monitor.timeout));
    table.number("rise", monitor.rise);
    table.number("fall", monitor.fall);
    table
}

fn named(kind: &str, key: &str, name: &str) -> Table {
    Table::new(format!("{kind} {name:?}"), format!("{key}.{}", bare(name)))
}

/// A name as a part of a header: a dot would begin the next part.
fn bare(name: &str) -> String {
    if name.contains('.') {
        quoted(name)
    } else {
        name.to_owned()
    }
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The largest unit that gives a whole number.
fn duration(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    match milliseconds {
        whole if whole % 1000 == 0 => format!("{}s", whole / 1000),
        odd => format!("{odd}ms"),
    }
}

/// A basic string of TOML.
fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04X}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
