//! Good files and what they mean.

use std::{collections::BTreeSet, fs, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use super::*;
use crate::{
    config::DEFAULT_HELO,
    model::{
        Attach, ClientAuth, ClientTerms, ClientTls, Forward, Generation, Guard, KeyExchange,
        Member, Method, Mode, Monitor, Network, Pin, Probe, ServerTerms, ServerTls, Snat, StartTls,
        Terms, TlsVersion, UnknownName, Verify, VirtualServer,
        policy::{Action, Range},
    },
};

pub(super) fn accepted(file: &str) -> Generation {
    match parse("/etc/smtplb/smtplb.toml", file) {
        Ok((generation, warnings)) if warnings.is_empty() => generation,
        Ok((_, warnings)) => panic!("{}", text(&warnings)),
        Err(faults) => panic!("{}", text(&faults)),
    }
}

fn terms() -> ClientTerms {
    ClientTerms {
        certificates: vec!["mail".into()],
        min_version: TlsVersion::V1_2,
        key_exchange: KeyExchange::ALL.to_vec(),
        auth: ClientAuth::None,
        unknown_name: UnknownName::Default,
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
            guard: Guard::default(),
            snat_ports: None,
            snat_exclude: Vec::new(),
        }
    );
    let [smtps, submission] = &generation.virtual_servers[..] else {
        panic!("two virtual servers")
    };
    assert_eq!(
        **smtps,
        VirtualServer {
            name: "smtps".into(),
            at: "203.0.113.10:465".parse::<SocketAddr>().unwrap().into(),
            forward: Forward::Passthrough {
                snat: Snat::Automap,
                proxy_protocol: false,
            },
            pool: "mx-tls".into(),
            guard: Guard::default(),
        }
    );
    assert_eq!(
        **submission,
        VirtualServer {
            name: "submission".into(),
            at: "203.0.113.10:587".parse::<SocketAddr>().unwrap().into(),
            forward: Forward::Proxy {
                client_tls: ClientTls::StartTls {
                    policy: StartTls::Require,
                    plaintext_pool: None,
                    terms: terms(),
                },
                terms: Terms::default(),
                server_tls: ServerTls::None,
                xclient: false,
            },
            pool: "msa".into(),
            guard: Guard::default(),
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
    let (generation, warnings) = parse("smtplb.toml", include_str!("design.toml")).unwrap();
    let warnings = text(&warnings);
    assert!(warnings.starts_with(
        "smtplb.toml:16:17: warning: virtual server \"submission\" hides its clients"
    ));
    assert_eq!(warnings.lines().count(), 3, "{warnings}");
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
        Forward::Proxy { client_tls, .. } => client_tls.clone(),
        Forward::Passthrough { .. } => panic!("a proxy"),
    };
    let allow = ClientTls::StartTls {
        policy: StartTls::Allow,
        plaintext_pool: None,
        terms: terms(),
    };
    assert_eq!(proxy("\"require\"", "\"allow\""), allow);
    let require = ClientTls::StartTls {
        policy: StartTls::Require,
        plaintext_pool: None,
        terms: terms(),
    };
    assert_eq!(proxy("starttls = \"require\"\n", ""), require);
    let implicit = ClientTls::Implicit(terms());
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
        assert_eq!(accepted(&file).virtual_servers[0].at.ports, [(port, port)]);
    }
}

#[test]
fn terms_towards_clients() {
    let lines = "server_tls = \"none\"\nclient_tls_min = \"1.3\"\nkey_exchange = [\"x25519\", \"x25519mlkem768\"]\n\
                 client_auth = \"require\"\nclient_roots = \"clients.pem\"\nunknown_name = \"refuse\"";
    let file = BASE.replace("server_tls = \"none\"", lines);
    let Forward::Proxy { client_tls, .. } = &accepted(&file).virtual_servers[1].forward else {
        panic!("a proxy")
    };
    assert_eq!(
        client_tls.terms(),
        Some(&ClientTerms {
            min_version: TlsVersion::V1_3,
            key_exchange: vec![KeyExchange::X25519, KeyExchange::X25519MlKem768],
            auth: ClientAuth::Require {
                roots: "/etc/smtplb/clients.pem".into()
            },
            unknown_name: UnknownName::Refuse,
            ..terms()
        })
    );
}

#[test]
fn tls_towards_members() {
    let server = |lines: &str| {
        let file = BASE.replace("server_tls = \"none\"", lines);
        match &parse("/etc/smtplb/smtplb.toml", &file)
            .unwrap()
            .0
            .virtual_servers[1]
            .forward
        {
            Forward::Proxy { server_tls, .. } => server_tls.clone(),
            Forward::Passthrough { .. } => panic!("a proxy"),
        }
    };
    let terms = |verify| ServerTerms {
        verify,
        name: None,
        certificate: None,
    };
    let full = terms(Verify::Full { roots: None });
    assert_eq!(
        server("server_tls = \"implicit\""),
        ServerTls::Implicit(full)
    );
    assert_eq!(
        server(
            "server_tls = \"starttls\"\nserver_roots = \"roots.pem\"\nserver_name = \"mx.example.\"\n\
             server_certificate = \"mail\""
        ),
        ServerTls::StartTls(ServerTerms {
            name: Some("mx.example".into()),
            certificate: Some("mail".into()),
            ..terms(Verify::Full {
                roots: Some("/etc/smtplb/roots.pem".into())
            })
        })
    );
    let pin = "LCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCw=";
    let pinned =
        format!("server_tls = \"implicit\"\nserver_verify = \"pinned\"\nserver_pins = [\"{pin}\"]");
    assert_eq!(
        server(&pinned),
        ServerTls::Implicit(terms(Verify::Pinned(vec![Pin([0x2c; 32])])))
    );
    let none = BASE.replace(
        "server_tls = \"none\"",
        "server_tls = \"implicit\"\nserver_verify = \"none\"",
    );
    let (_, warnings) = parse("smtplb.toml", &none).unwrap();
    assert_eq!(
        text(&warnings),
        "smtplb.toml:22:17: warning: virtual server \"submission\" does not verify its members: server_verify = \"none\"\n  \
         Whoever sits between this box and a member can read and change all mail, TLS or not.\n  \
         Set server_verify = \"pinned\" with the members' keys, or \"full\"."
    );
}

#[test]
fn plain_proxying_needs_no_certificate() {
    let generation = accepted(
        "[network]\nclient_interfaces = [\"lo\"]\n\
         [virtual_server.smtp]\naddress = \"127.0.0.2\"\nport = \"smtp\"\nforward = \"proxy\"\npool = \"mx\"\n\
         proxy_protocol = \"none\"\n[pool.mx]\nmonitor = \"mx\"\nmember = [{ address = \"2001:db8::25\", port = 25 }]\n\
         [monitor.mx]\ntype = \"smtp\"\n",
    );
    assert_eq!(
        generation.virtual_servers[0].forward,
        Forward::Proxy {
            client_tls: ClientTls::None,
            terms: Terms::default(),
            server_tls: ServerTls::None,
            xclient: false,
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

/// The base file with these lines in the virtual server `smtps` and at the end.
fn with(server: &str, end: &str) -> String {
    let from = "address = \"203.0.113.10\"\nport = 465\n";
    format!("{}\n{end}\n", BASE.replacen(from, server, 1))
}

#[test]
fn prefixes_and_port_lists_reach_the_model() {
    let at = |lines: &str| accepted(&with(lines, "")).virtual_servers[0].at.to_string();
    assert_eq!(
        at("address = \"203.0.113.0/24\"\nport = 465\n"),
        "203.0.113.0/24:465"
    );
    assert_eq!(
        at("address = \"203.0.113.10\"\nport = [\"smtps\", 25, \"1000-1010\"]\n"),
        "203.0.113.10:25,465,1000-1010"
    );
    assert_eq!(
        at("address = \"203.0.113.10\"\nport = \"1000-1255\"\n"),
        "203.0.113.10:1000-1255"
    );
    // The longer prefix wins, so both may be there.
    assert_eq!(
        at("address = \"203.0.113.0/28\"\nport = [465, 587]\n"),
        "203.0.113.0/28:465,587"
    );
}

#[test]
fn every_key_of_a_policy_reaches_the_model() {
    let policy = r#"
[policy.edge]
default = "deny"
log = true
[[policy.edge.rule]]
name = "office"
source = ["192.0.2.0/25", "192.0.2.128/25 2001:db8::1-2001:db8::9"]
vlans = [10]
interfaces = ["eth0"]
action = "accept"
schedule = { days = ["mon-fri"], times = ["08:00-12:00", "13:00-18:00"], timezone = "Europe/Berlin" }
[[policy.edge.rule]]
name = "bad"
enabled = false
source = "198.51.100.7"
action = "reject"
reject_with = "rst"
log = true
[[policy.edge.rule]]
name = "polite"
action = "reject"
"#;
    let server = "address = \"203.0.113.10\"\nport = 465\npolicy = \"edge\"\nstaged_policy = \"edge\"\nconnection_rate = { per_source = \"50/s\", burst = 100 }\n";
    let generation =
        accepted(&with(server, policy).replace("[network]\n", "[network]\npolicy = \"edge\"\n"));
    assert_eq!(generation.network.guard.policy.as_deref(), Some("edge"));
    let guard = &generation.virtual_servers[0].guard;
    assert_eq!(
        (guard.policy.as_deref(), guard.staged.as_deref()),
        (Some("edge"), Some("edge"))
    );
    assert_eq!(
        guard.rate.map(|rate| (rate.interval, rate.burst)),
        Some((20_000_000, 100))
    );
    let policy = &generation.policies["edge"];
    assert_eq!((policy.default, policy.log), (Action::Drop, true));
    let [office, bad, polite] = &policy.rules[..] else {
        panic!("three rules")
    };
    assert_eq!(office.source.len(), 2, "two halves make one");
    assert_eq!(
        (&office.vlans[..], &office.interfaces[..]),
        (&[10][..], &["eth0".to_owned()][..])
    );
    let schedule = office.schedule.as_ref().unwrap();
    assert_eq!(
        (schedule.days, &schedule.times[..]),
        (0b001_1111, &[(480, 720), (780, 1080)][..])
    );
    assert_eq!(
        (bad.enabled, bad.action, bad.log),
        (false, Action::RejectRst, true)
    );
    assert_eq!(
        (polite.action, &*polite.source),
        (Action::RejectIcmp, &[Range::ALL][..])
    );
}

#[test]
fn a_hundred_thousand_sources_come_from_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let mut feed = "# feed of bad networks\n\n".to_owned();
    for place in 0..100_000u32 {
        let [a, b, c, d] = (0x0a00_0000 + place * 512).to_be_bytes();
        feed.push_str(&format!("{a}.{b}.{c}.{d}/24 # {place}\n"));
    }
    fs::write(directory.path().join("bad.txt"), feed).unwrap();
    let policy = "[policy.edge]\ndefault = \"accept\"\n[[policy.edge.rule]]\nname = \"bad\"\nsource_file = \"bad.txt\"\naction = \"drop\"\n";
    let server = "address = \"203.0.113.10\"\nport = 465\npolicy = \"edge\"\n";
    let path = directory.path().join("smtplb.toml");
    let (generation, warnings) = parse(path.to_str().unwrap(), &with(server, policy)).unwrap();
    assert!(warnings.is_empty(), "{}", text(&warnings));
    assert_eq!(generation.policies["edge"].rules[0].source.len(), 100_000);
    fs::write(directory.path().join("bad.txt"), "10.0.0.1\n10.0.0.300\n").unwrap();
    let faults = parse(path.to_str().unwrap(), &with(server, policy)).unwrap_err();
    assert!(
        text(&faults).contains("bad.txt:2: \"10.0.0.300\", which is no address"),
        "{}",
        text(&faults)
    );
}

#[test]
fn a_shadowed_rule_is_a_warning_at_its_place() {
    let policy = "[policy.edge]\ndefault = \"accept\"\n[[policy.edge.rule]]\nname = \"all\"\naction = \"drop\"\n[[policy.edge.rule]]\nname = \"friends\"\nsource = \"192.0.2.1\"\naction = \"accept\"\n";
    let server = "address = \"203.0.113.10\"\nport = 465\npolicy = \"edge\"\n";
    let file = with(server, policy);
    let (_, warnings) = parse("smtplb.toml", &file).unwrap();
    let line = 1 + file
        .lines()
        .position(|line| line.contains("\"friends\""))
        .unwrap();
    let told = text(&warnings);
    assert!(
        told.starts_with(&format!("smtplb.toml:{}:", line - 1)),
        "{line}: {told}"
    );
    assert!(
        told.contains(
            "rule \"friends\" of policy \"edge\" can never match\n  Rule \"all\" before it"
        ),
        "{told}"
    );
}
