//! Files that the tables of the kernel plane have no room for, each beside the last one that fits.

use std::fmt::Write as _;

use super::*;

/// So many pools of so many members on addresses of their own, with a passthrough virtual server for each kind of SNAT.
fn file(max_flows: u32, pools: u32, members: u32, kinds: &[&str]) -> String {
    let mut file = format!(
        "[network]\nclient_interfaces = [\"c0\"]\nserver_interfaces = [\"s0\"]\nmax_flows = {max_flows}\n\
         [monitor.tcp]\ntype = \"tcp\"\n"
    );
    for pool in 0..pools {
        let _ = writeln!(file, "[pool.p{pool}]\nmonitor = \"tcp\"");
        for member in 0..members {
            let (high, low) = (pool, member + 1);
            let address = format!("10.{}.{}.{low}", high / 250, high % 250);
            let _ = writeln!(
                file,
                "[[pool.p{pool}.member]]\naddress = \"{address}\"\nport = 25"
            );
        }
        for (kind, snat) in kinds.iter().enumerate() {
            let port = 1000 + pool;
            let _ = writeln!(
                file,
                "[virtual_server.v{pool}-{kind}]\naddress = \"192.0.2.{kind}\"\nport = {port}\n\
                 forward = \"passthrough\"\npool = \"p{pool}\"\nsnat = \"{snat}\"",
            );
        }
    }
    file
}

/// A SNAT pool of so many addresses.
fn snat(name: &str, network: u32, addresses: u32, ports: &str) -> String {
    let list: Vec<_> = (1..=addresses)
        .map(|last| format!("\"172.16.{network}.{last}\""))
        .collect();
    format!(
        "[snat.{name}]\naddresses = [{}]\n{ports}\n",
        list.join(", ")
    )
}

fn faults(file: &str) -> String {
    match parse("smtplb.toml", file) {
        Ok(_) => String::new(),
        Err(faults) => text(&faults),
    }
}

#[test]
fn pairs_of_snat_address_and_member() {
    let pool = snat("wide", 0, 21, "");
    let with = |flows, members, kinds: &[&str]| faults(&(file(flows, 1, members, kinds) + &pool));
    // 21 addresses towards each of three members.
    assert_eq!(with(1024, 3, &["wide"]), "");
    let said = with(1024, 4, &["wide"]);
    assert!(
        said.contains(
            "error: virtual server \"v0-0\" brings the file to 84 pairs of SNAT address and member\n  \
             max_flows = 1024 makes room for 63.\n  Raise max_flows in [network], or take fewer SNAT addresses."
        ),
        "{said}"
    );
    // The box's own address, and records that are lent without one, are pairs as well.
    for kind in ["automap", "none"] {
        let said = with(1024, 3, &["wide", kind]);
        assert!(said.contains("\"v0-1\" brings the file to 6"), "{said}");
    }
    assert_eq!(with(64 * 84, 4, &["wide"]), "");
    assert!(!with(64 * 83, 4, &["wide"]).is_empty());
}

#[test]
fn pools_with_each_kind_of_snat() {
    let pools = snat("a", 0, 1, "") + &snat("b", 1, 1, "");
    let with =
        |pools_of: u32| faults(&(file(262_144, pools_of, 1, &["automap", "a", "b"]) + &pools));
    assert_eq!(with(127), "");
    let said = with(128);
    assert!(
        said.contains("\"v127-2\" brings the file to 512 pools"),
        "{said}"
    );
}

#[test]
fn choices_of_ports() {
    let with = |count: u32| {
        let names: Vec<_> = (0..count).map(|it| format!("s{it}")).collect();
        let kinds: Vec<_> = names.iter().map(String::as_str).collect();
        let pools = (0..count).map(|it| {
            snat(
                &names[it as usize],
                it,
                1,
                &format!("exclude = [{}]", 2000 + it),
            )
        });
        faults(&(file(262_144, 1, 1, &kinds) + &pools.collect::<String>()))
    };
    assert_eq!(with(127), "");
    let said = with(128);
    assert!(
        said.contains("brings the file to 128 different choices of ports"),
        "{said}"
    );
}
