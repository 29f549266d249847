//! What the tables of the kernel plane hold is known before a start.

use super::*;

/// A passthrough file: so many members in each pool, and a virtual server with a kind of SNAT for each word.
fn file(flows: u32, members: usize, servers: &[(&str, &str)], rest: &str) -> String {
    let mut file = format!(
        "[network]\nclient_interfaces = [\"a\"]\nserver_interfaces = [\"b\"]\nmax_flows = {flows}\n\
         [monitor.m]\ntype = \"tcp\"\n{rest}"
    );
    let mut pools: Vec<&str> = servers.iter().map(|(pool, _)| *pool).collect();
    pools.sort_unstable();
    pools.dedup();
    for (port, (pool, snat)) in (1..).zip(servers) {
        file += &format!(
            "[virtual_server.s{port}]\naddress = \"203.0.113.1\"\nport = {port}\nforward = \"passthrough\"\n\
             pool = \"{pool}\"\nsnat = \"{snat}\"\nproxy_protocol = \"none\"\n"
        );
    }
    for (net, pool) in pools.into_iter().enumerate() {
        file += &format!("[pool.{pool}]\nmonitor = \"m\"\n");
        for member in 1..=members {
            file += &format!(
                "[[pool.{pool}.member]]\naddress = \"10.{}.{}.{member}\"\nport = 25\n",
                net / 256,
                net % 256
            );
        }
    }
    file
}

fn snat(name: &str, addresses: std::ops::RangeInclusive<u8>, ports: u16) -> String {
    let addresses: Vec<_> = addresses.map(|at| format!("\"192.0.2.{at}\"")).collect();
    format!(
        "[snat.{name}]\naddresses = [{}]\nports = \"{ports}-65535\"\n",
        addresses.join(", ")
    )
}

#[test]
fn pairs_of_address_and_member() {
    let four = snat("four", 1..=4, 1024);
    let of = |flows, members| parse("f", &file(flows, members, &[("p", "four")], &four));
    let fits = of(1024, 15).unwrap();
    assert_eq!(text(&fits.1), "", "60 pairs of 63");
    assert_eq!(
        text(&of(1024, 17).unwrap_err()),
        "f:10:17: error: virtual server \"s1\" brings the file to 68 pairs of SNAT address and member\n  \
         63 are the most with max_flows = 1024.\n  \
         Raise max_flows, or use fewer addresses or members."
    );
    of(8192, 17).unwrap();
    // Every member once, however many virtual servers it has.
    parse("f", &file(1024, 40, &[("p", "automap"); 5], "")).unwrap();
    // `none` lends records by 65,536.
    let three = [("p", "automap"), ("q", "automap"), ("q", "none")];
    parse("f", &file(1024, 31, &three, "")).unwrap();
    let error = parse("f", &file(1024, 32, &three, "")).unwrap_err();
    assert!(text(&error).contains("to 64 pairs"), "{}", text(&error));
}

#[test]
fn pools_with_kinds_of_snat() {
    let pools: Vec<_> = (0..200).map(|at| format!("p{at}")).collect();
    let wide = snat("wide", 1..=1, 1024);
    let mut servers: Vec<_> = pools.iter().map(|pool| (&pool[..], "automap")).collect();
    servers.extend(pools.iter().take(111).map(|pool| (&pool[..], "wide")));
    parse("f", &file(1 << 20, 1, &servers, &wide)).unwrap();
    servers.push((&pools[150], "wide"));
    let error = text(&parse("f", &file(1 << 20, 1, &servers, &wide)).unwrap_err());
    assert!(error.contains("to 512 pools, each counted"), "{error}");
    assert!(error.contains("511 are the most."), "{error}");
}

#[test]
fn sets_of_ports() {
    let pools: String = (0..=252)
        .map(|at| snat(&format!("s{at}"), at..=at, 2000 + u16::from(at)))
        .collect();
    let names: Vec<_> = (0..=252).map(|at| format!("s{at}")).collect();
    let mut servers: Vec<_> = names.iter().map(|name| ("p", &name[..])).collect();
    let error = text(&parse("f", &file(1 << 20, 1, &servers, &pools)).unwrap_err());
    assert!(error.contains("to 253 sets of SNAT ports"), "{error}");
    servers.pop();
    parse("f", &file(1 << 20, 1, &servers, &pools)).unwrap();
}
