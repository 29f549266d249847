//! A generation in the words of the file loads to itself, and two of them are compared by these words.

use std::{collections::BTreeSet, fs, path::Path};

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
