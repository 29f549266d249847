//! Virtual servers on prefixes and lists of ports, in both planes and families, with real mail.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use tests::{
    client::{Mode, Options},
    daemon::config::{ClientTls, Config, tag},
    lab::{Family, Lab, Plan},
    mail::Sizes,
    member::{Mta, Site},
};

use crate::scene::{Scene, play};

/// A prefix that is routed to the box, and some of its addresses.
fn prefix(family: Family) -> (&'static str, [IpAddr; 3]) {
    let (prefix, addresses) = match family {
        Family::V4 => ("10.79.0.0/24", ["10.79.0.0", "10.79.0.77", "10.79.0.255"]),
        Family::V6 => (
            "fd79::/64",
            ["fd79::1", "fd79::77", "fd79::ffff:ffff:ffff:ffff"],
        ),
    };
    (
        prefix,
        addresses.map(|address| address.parse().expect("an address")),
    )
}

fn config(lab: &Lab, site: &Site) -> Config {
    let mut config = Config::new(lab, "tc");
    config.certificate("mail", &site.certificate);
    for family in Family::ALL {
        let tag = tag(family);
        let place = |ports: &str| format!("address = \"{}\"\nport = {ports}", prefix(family).0);
        for port in [465, 25] {
            config.pool(lab, &format!("p{port}-{tag}"), family, port, None);
        }
        config.raw(&format!(
            "\n[virtual_server.through-{tag}]\n{}\nforward = \"passthrough\"\npool = \"p465-{tag}\"",
            place("[465, \"1465-1467\"]")
        ));
        config.raw(&format!(
            "\n[virtual_server.proxied-{tag}]\n{}\nforward = \"proxy\"\npool = \"p25-{tag}\"\n\
             client_tls = \"starttls\"\ncertificates = [\"mail\"]",
            place("[\"submission\", 2587]")
        ));
        // One address of the prefix belongs to somebody else.
        let own = prefix(family).1[1];
        config.proxy(
            &format!("own-{tag}"),
            own,
            2587,
            &format!("p25-{tag}"),
            ClientTls::None,
        );
    }
    config
}

fn carry(scene: &mut Scene<'_>) -> Result<()> {
    let client = &scene.lab.clients[0];
    let mut sent = Vec::new();
    for family in Family::ALL {
        let (prefix, addresses) = prefix(family);
        let via = match family {
            Family::V4 => "10.71.0.1",
            Family::V6 => "fd71::1",
        };
        client
            .namespace
            .ip(&[format!("route add {prefix} via {via}")])?;
        let mut ways: Vec<(SocketAddr, Mode)> = Vec::new();
        for address in addresses {
            ways.extend([465, 1466].map(|port| ((address, port).into(), Mode::Implicit)));
            ways.push(((address, 587).into(), Mode::Starttls));
        }
        ways.push(((addresses[0], 2587).into(), Mode::Starttls));
        ways.push(((addresses[1], 2587).into(), Mode::Plain));
        for (place, (to, mode)) in ways.into_iter().enumerate() {
            let options = Options {
                mode,
                count: 2,
                sizes: Sizes::MixedUpTo(200_000),
                run: format!("{}-{place}", tag(family)),
                ..Options::to(to)
            };
            sent.extend(scene.send(client, &options)?);
        }
        let closed = client
            .namespace
            .enter(|| Ok(std::net::TcpStream::connect((addresses[0], 26))))?;
        ensure!(
            closed
                .as_ref()
                .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused),
            "{closed:?}"
        );
    }
    scene.check_balance(&sent)?;
    let shown: Vec<_> = scene
        .daemon
        .status()?
        .virtual_servers
        .into_iter()
        .map(|server| server.address)
        .collect();
    ensure!(
        shown.contains(&"10.79.0.0/24:465,1465-1467".to_owned()),
        "{shown:?}"
    );
    ensure!(
        shown.contains(&"[fd79::/64]:587,2587".to_owned()),
        "{shown:?}"
    );
    scene.daemon.stop()?;
    let routes = scene
        .lab
        .balancer
        .run(std::process::Command::new("ip").args(["route", "show", "table", "local"]))?;
    ensure!(!routes.contains("10.79.0.0"), "{routes}");
    Ok(())
}

#[test]
fn prefixes_and_port_lists_carry_mail() -> Result<()> {
    play(Plan::TWO_ARM, Mta::Sink, config, carry)
}
