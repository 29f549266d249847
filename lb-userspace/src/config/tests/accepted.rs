//! Good files and what they mean.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use super::*;
use crate::{
    config::DEFAULT_HELO,
    model::{
        Attach, ClientTls, Forward, Generation, Member, Method, Mode, Monitor, Network, Probe,
        Snat, StartTls, VirtualServer,
    },
};

fn accepted(file: &str) -> Generation {
    match parse("/etc/smtplb/smtplb.toml", file) {
        Ok((generation, warnings)) if warnings.is_empty() => generation,
        Ok((_, warnings)) => panic!("{}", text(&warnings)),
        Err(faults) => panic!("{}", text(&faults)),
    }
}

#[test]
fn every_key_reaches_the_model() {
    let generation = accepted(BASE);
    assert_eq!(generation.mode, Mode::Mixed);
    assert_eq!(
        generation.network,
        Network {
            client_interfaces: vec!["eth0".into()],
            server_interfaces: vec!["eth1".into()],
            attach: Attach::Auto,
            max_flows: lb_common::layout::DEFAULT_FLOWS,
            vlans: BTreeSet::new(),
        }
    );
    let [smtps, submission] = &generation.virtual_servers[..] else {
        panic!("two virtual servers")
    };
    assert_eq!(
        **smtps,
        VirtualServer {
            name: "smtps".into(),
            address: "203.0.113.10".parse().unwrap(),
            port: 465,
            forward: Forward::Passthrough {
                snat: Snat::Automap,
                proxy_protocol: false,
            },
            pool: "mx-tls".into(),
        }
    );
    assert_eq!(
        **submission,
        VirtualServer {
            name: "submission".into(),
            address: "203.0.113.10".parse().unwrap(),
            port: 587,
            forward: Forward::Proxy {
                client_tls: ClientTls::StartTls {
                    policy: StartTls::Require,
                    certificates: vec!["mail".into()],
                },
            },
            pool: "msa".into(),
        }
    );
    let certificate = &generation.certificates["mail"];
    assert_eq!(
        certificate.chain,
        Path::new("/etc/smtplb/mail.pem"),
        "relative to the file"
    );
    assert_eq!(certificate.key, Path::new("/etc/smtplb/mail.key"));
    let tls = &generation.pools["mx-tls"];
    assert_eq!(
        (tls.method, tls.monitor.as_deref()),
        (Method::LeastConnections, Some("port"))
    );
    let address = "10.0.0.21:465".parse().unwrap();
    assert_eq!(
        tls.members,
        [Member {
            name: "10.0.0.21:465".into(),
            address
        }]
    );
    let msa = &generation.pools["msa"];
    assert_eq!(
        (msa.method, msa.monitor.as_deref()),
        (Method::RoundRobin, Some("msa"))
    );
    assert_eq!(
        msa.members
            .iter()
            .map(|member| &*member.name)
            .collect::<Vec<_>>(),
        ["msa1", "msa2"]
    );
    assert_eq!(
        *generation.monitors["port"],
        Monitor {
            name: "port".into(),
            probe: Probe::Tcp,
            interval: Duration::from_millis(500),
            timeout: Duration::from_secs(3600),
            rise: 1,
            fall: 1,
        }
    );
    assert_eq!(
        *generation.monitors["msa"],
        Monitor {
            name: "msa".into(),
            probe: Probe::Smtp {
                helo: "lb.example.org".into()
            },
            interval: Duration::from_secs(30),
            timeout: Duration::from_secs(91),
            rise: 2,
            fall: 3,
        }
    );
}

#[test]
fn the_example_of_the_design_is_accepted() {
    let generation = accepted(include_str!("design.toml"));
    assert_eq!(generation.virtual_servers.len(), 2);
    let servers: Vec<_> = generation
        .virtual_servers
        .iter()
        .map(|server| server.socket_addr().to_string())
        .collect();
    assert_eq!(servers, ["203.0.113.10:465", "203.0.113.10:587"]);
}

#[test]
fn words_choose_what_they_say() {
    let network = |line: &str| {
        accepted(&BASE.replace("[network]\n", &format!("[network]\n{line}\n"))).network
    };
    assert_eq!(network("attach = \"xdp\"").attach, Attach::Xdp);
    assert_eq!(
        network("attach = \"xdp-generic\"").attach,
        Attach::XdpGeneric
    );
    assert_eq!(network("attach = \"tc\"").attach, Attach::Tc);
    assert_eq!(network("max_flows = 16_777_216").max_flows, 16_777_216);
    assert_eq!(network("max_flows = 0x400").max_flows, 1024);
    assert_eq!(network("vlans = [20, 10]").vlans, BTreeSet::from([10, 20]));

    let proxy = |old: &str, new: &str| match &accepted(&BASE.replace(old, new)).virtual_servers[1]
        .forward
    {
        Forward::Proxy { client_tls } => client_tls.clone(),
        Forward::Passthrough { .. } => panic!("a proxy"),
    };
    let certificates = || vec!["mail".into()];
    let allow = ClientTls::StartTls {
        policy: StartTls::Allow,
        certificates: certificates(),
    };
    assert_eq!(proxy("\"require\"", "\"allow\""), allow);
    let require = ClientTls::StartTls {
        policy: StartTls::Require,
        certificates: certificates(),
    };
    assert_eq!(proxy("starttls = \"require\"\n", ""), require);
    let implicit = ClientTls::Implicit {
        certificates: certificates(),
    };
    assert_eq!(
        proxy(
            "client_tls = \"starttls\"\nstarttls = \"require\"",
            "client_tls = \"implicit\""
        ),
        implicit
    );

    let snat = accepted(&BASE.replace("snat = \"automap\"", "snat = \"none\""));
    assert_eq!(
        snat.virtual_servers[0].forward,
        Forward::Passthrough {
            snat: Snat::None,
            proxy_protocol: false,
        }
    );
    let helo = accepted(&BASE.replace("helo = \"lb.example.org\"\n", ""));
    assert_eq!(
        helo.monitors["msa"].probe,
        Probe::Smtp {
            helo: DEFAULT_HELO.into()
        }
    );
}

#[test]
fn ports_have_names() {
    for (word, port) in [
        ("\"smtp\"", 25),
        ("\"submission\"", 587),
        ("\"smtps\"", 465),
        ("2525", 2525),
    ] {
        let file = BASE.replacen(
            "203.0.113.10\"\nport = 465",
            &format!("2001:db8::10\"\nport = {word}"),
            1,
        );
        let file = file.replace("10.0.0.21", "2001:db8::21");
        assert_eq!(accepted(&file).virtual_servers[0].port, port);
    }
}

#[test]
fn plain_proxying_needs_no_certificate() {
    let generation = accepted(
        "[network]\nclient_interfaces = [\"lo\"]\n\
         [virtual_server.smtp]\naddress = \"127.0.0.2\"\nport = \"smtp\"\nforward = \"proxy\"\npool = \"mx\"\n\
         [pool.mx]\nmonitor = \"mx\"\nmember = [{ address = \"2001:db8::25\", port = 25 }]\n\
         [monitor.mx]\ntype = \"smtp\"\n",
    );
    assert_eq!(
        generation.virtual_servers[0].forward,
        Forward::Proxy {
            client_tls: ClientTls::None
        }
    );
    assert_eq!(
        &*generation.pools["mx"].members[0].name,
        "[2001:db8::25]:25"
    );
}

#[test]
fn virtual_servers_keep_the_order_of_the_file() {
    let file = BASE.replace("virtual_server.smtps", "virtual_server.z");
    let names: Vec<_> = accepted(&file)
        .virtual_servers
        .iter()
        .map(|server| server.name.clone())
        .collect();
    assert_eq!(names, [Arc::from("z"), Arc::from("submission")]);
}

#[test]
fn what_is_hardly_meant_is_warned_of() {
    let tls = "client_tls = \"starttls\"\nstarttls = \"require\"\ncertificates = [\"mail\"]\n";
    let mut file = BASE.replace("monitor = \"msa\"\n", "").replace(tls, "");
    file += "[pool.spare]\nmember = [{ address = \"10.0.0.99\", port = 25 }]\n";
    let (_, warnings) = parse("smtplb.toml", &file).unwrap();
    assert_eq!(
        text(&warnings),
        "\
smtplb.toml:22:14: warning: certificate \"mail\" is not used by any virtual server
  It has no effect.
  Name it in a virtual server, or remove it.
smtplb.toml:32:7: warning: pool \"msa\" has no monitor
  Its members count as up, even one that is dead.
  Add a key `monitor` that names a `[monitor.NAME]`.
smtplb.toml:49:10: warning: monitor \"msa\" is not used by any pool
  It has no effect.
  Name it in a pool, or remove it.
smtplb.toml:54:7: warning: pool \"spare\" is not used by any virtual server
  It has no effect.
  Name it in a virtual server, or remove it."
    );
    let (_, warnings) = parse("smtplb.toml", "").unwrap();
    assert_eq!(
        text(&warnings),
        "\
smtplb.toml:1:1: warning: the file has no virtual server
  smtplb would run and carry nothing.
  Add a table `[virtual_server.NAME]`."
    );
}
