//! A generation in the words of the file loads to itself, and two of them are compared by these words.

use std::{collections::BTreeSet, fs, net::Ipv4Addr, path::Path};

use super::{BASE, parse};
use crate::model::{
    Generation,
    diff::{self, Change},
    show,
};

fn generation(text: &str) -> Generation {
    parse("/etc/smtplb/smtplb.toml", text).unwrap().0
}

#[test]
fn what_is_shown_loads_to_the_same() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let folders = [deploy.clone(), deploy.join("examples")];
    let mut texts = vec![BASE.to_owned(), String::new()];
    for folder in folders {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            if entry.path().extension().is_some_and(|end| end == "toml") {
                texts.push(fs::read_to_string(entry.path()).unwrap());
            }
        }
    }
    texts.push(
        r#"
        [network]
        client_interfaces = ["eth0"]
        server_interfaces = ["eth1"]
        vlans = [20, 10]
        [log]
        flows = false
        flows_per_second = 7
        [virtual_server."odd.name"]
        address = "2001:db8::1"
        port = 465
        forward = "passthrough"
        snat = "none"
        pool = "a.b"
        [session]
        drain_timeout = "90s"
        command_timeout = "10m"
        max_sessions = 12345
        max_recipients = 0
        find_member_timeout = "3m"
        member_handshake_timeout = "1500ms"
        discard_timeout = "20s"
        [virtual_server.terms]
        address = "2001:db8::1"
        port = 2525
        forward = "proxy"
        pool = "a.b"
        snat = "wide"
        proxy_protocol = "v1"
        accept_proxy_from = ["10.0.0.0/8", "192.0.2.1-192.0.2.9"]
        pregreet = { wait = "2s", action = "delay", penalty = "1500ms" }
        line_endings = "normalize"
        max_sessions = 5
        max_sessions_per_source = 4
        [snat.wide]
        addresses = ["2001:db8::200"]
        [virtual_server.mx]
        address = "2001:db8::1"
        port = 25
        forward = "proxy"
        server_tls = "starttls"
        server_roots = "/etc/roots.pem"
        server_name = "mx.example"
        server_certificate = "own"
        xclient = true
        pool = "a.b"
        [virtual_server.msa]
        address = "2001:db8::1"
        port = 587
        forward = "proxy"
        client_tls = "implicit"
        certificates = ["own"]
        client_tls_min = "1.3"
        key_exchange = ["x25519"]
        client_auth = "request"
        client_roots = "/etc/clients.pem"
        unknown_name = "refuse"
        pool = "a.b"
        [virtual_server.both]
        address = "2001:db8::1"
        port = 26
        forward = "proxy"
        client_tls = "starttls"
        starttls = "allow"
        certificates = ["own"]
        plaintext_pool = "legacy"
        pool = "a.b"
        [pool.legacy]
        [[pool.legacy.member]]
        address = "2001:db8::8"
        port = 25
        [virtual_server.mx2]
        address = "2001:db8::2"
        port = 25
        forward = "proxy"
        server_tls = "implicit"
        server_verify = "pinned"
        server_pins = ["LCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCw="]
        pool = "a.b"
        [certificate.own]
        chain = "/etc/own.pem"
        key = "/etc/own.key"
        [pool."a.b"]
        on_down = "reset"
        monitor = "m"
        [[pool."a.b".member]]
        address = "2001:db8::9"
        port = 25
        [monitor.m]
        type = "tcp"
        interval = "1500ms"
        "#
        .to_owned(),
    );
    assert!(texts.len() > 5);
    for text in texts {
        let once = generation(&text);
        let shown = show::text(&once);
        assert_eq!(generation(&shown), once, "{shown}");
        assert_eq!(
            diff::between(&once, &generation(&shown), &BTreeSet::new()),
            []
        );
    }
}

/// A policy of one rule, on whatever the file has else.
fn with_rule(rule: &str) -> String {
    format!(
        "{BASE}\n[policy.edge]\ndefault = \"accept\"\n[[policy.edge.rule]]\nname = \"bad\"\n{rule}\naction = \"drop\"\n"
    )
}

#[test]
fn sources_of_any_number_load_again() {
    let feed = |count: u32, step: u32| -> Vec<String> {
        let address = |place: u32| Ipv4Addr::from(0x0a00_0001 + place * step);
        (0..count).map(|place| address(place).to_string()).collect()
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.txt");
    let named = format!("source_file = {:?}", path.display().to_string());
    let odd = "source = [\"192.0.2.0/25\", \"192.0.2.130-192.0.2.140\", \"2001:db8::/33\"]";
    for (rule, held) in [
        (odd.to_owned(), String::new()),
        ("source = \"::/1\"".to_owned(), String::new()),
        (format!("source = {:?}", feed(257, 2)), String::new()),
        (
            format!("source = \"{}\"", feed(80_000, 3).join(" ")),
            String::new(),
        ),
        (named.clone(), String::new()),
        (named.clone(), feed(100_000, 5).join("\n")),
        (
            format!("{named}\nsource = \"192.0.2.1\""),
            "192.0.2.2".to_owned(),
        ),
        (
            format!("{named}\nsource = \"::/0 0.0.0.0/0\""),
            String::new(),
        ),
    ] {
        fs::write(&path, held).unwrap();
        let once = generation(&with_rule(&rule));
        let shown = show::text(&once);
        assert!(
            generation(&shown) == once,
            "{}",
            &shown[..2000.min(shown.len())]
        );
    }
    assert!(
        show::text(&generation(&with_rule(odd))).contains(
            "source = [\"192.0.2.0/25\", \"192.0.2.130-192.0.2.140\", \"2001:db8::/33\"]\n"
        )
    );
    let before = generation(&with_rule(&named));
    fs::write(&path, "192.0.2.3").unwrap();
    let after = generation(&with_rule(&named));
    let found = diff::between(&before, &after, &BTreeSet::new());
    let told = &found[0].details;
    assert!(
        told.len() == 1 && told[0].starts_with("sources when it was read: 0 ranges, fingerprint "),
        "{told:?}"
    );
}

#[test]
fn differences_are_told_by_object_and_key() {
    let old = generation(BASE);
    let name = old.pools.keys().next().unwrap().clone();
    let mut new = old.clone();
    let gone = new.virtual_servers.remove(0);
    let mut pool = (*new.pools[&name]).clone();
    pool.members[0].address.set_port(4711);
    let port = old.pools[&name].members[0].address.port();
    let member = format!("member {:?}", format!("{name}/{}", pool.members[0].name));
    new.pools.insert(name, pool.into());
    let renewed: BTreeSet<_> = old.certificates.keys().take(1).cloned().collect();
    let found = diff::between(&old, &new, &renewed);
    let of = |object: &str| found.iter().find(|difference| difference.object == object);
    let removed = of(&format!("virtual server {:?}", &*gone.name)).unwrap();
    assert_eq!(removed.change, Change::Removed);
    assert_eq!(
        of(&member).unwrap().details,
        [format!("port: {port} → 4711")]
    );
    for name in &renewed {
        let changed = of(&format!("certificate {:?}", &**name)).unwrap();
        assert_eq!(changed.details, ["the files have other content"]);
    }
    assert_eq!(found.len(), 2 + renewed.len());
    let mut turned = old.clone();
    turned.virtual_servers.reverse();
    let found = diff::between(&old, &turned, &BTreeSet::new());
    assert_eq!(found.len(), 1, "the order is a difference too");
}
