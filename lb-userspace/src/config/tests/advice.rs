//! What is accepted with a warning: whom members take for the client.

use super::*;

const SMTPS: &str = "snat = \"automap\"\nproxy_protocol = 'none'\n";

/// What is said of the base file with other terms of its passthrough virtual server, and changes beside.
fn said(terms: &str, change: impl Fn(String) -> String) -> String {
    let file = change(BASE.replace(SMTPS, terms));
    text(&parse("smtplb.toml", &file).unwrap().1)
}

#[test]
fn hidden_clients_are_a_warning_until_it_is_said_that_they_are_meant() {
    let warning = "smtplb.toml:7:17: warning: virtual server \"smtps\" hides its clients from the members\n  \
         They see an address of this box in every client's stead: a mail server that trusts it, as in Postfix's \
         mynetworks, is an open relay.\n  \
         Set proxy_protocol = \"v2\" or snat = \"none\"; or write proxy_protocol = \"none\", if no member trusts this box.";
    let wide = |file| format!("{file}[snat.wide]\naddresses = [\"10.0.0.200\"]\n");
    assert_eq!(said("", |file| file), warning);
    assert_eq!(said("snat = \"automap\"\n", |file| file), warning);
    assert_eq!(said("snat = \"wide\"\n", wide), warning);
    for quiet in [
        "snat = \"none\"\n",
        "proxy_protocol = \"none\"\n",
        "proxy_protocol = \"v2\"\n",
    ] {
        assert_eq!(said(quiet, |file| file), "", "{quiet}");
    }
}

#[test]
fn a_proxy_hides_its_clients_too() {
    let said = |terms: &str| {
        let file = BASE.replace("proxy_protocol = \"none\"\n", terms);
        text(&parse("smtplb.toml", &file).unwrap().1)
    };
    let warning = "smtplb.toml:14:17: warning: virtual server \"submission\" hides its clients from the members\n  \
         They see an address of this box in every client's stead: a mail server that trusts it, as in Postfix's \
         mynetworks, is an open relay.\n  \
         Set proxy_protocol = \"v2\", xclient = true or snat = \"none\"; or write proxy_protocol = \"none\", if no member \
         trusts this box.";
    for terms in ["", "snat = \"automap\"\n", "xclient = false\n"] {
        assert_eq!(said(terms), warning, "{terms}");
    }
    for quiet in [
        "snat = \"none\"\n",
        "xclient = true\n",
        "proxy_protocol = \"none\"\n",
    ] {
        assert_eq!(said(quiet), "", "{quiet}");
    }
}

#[test]
fn probes_without_a_header_where_members_get_one() {
    let smtp = |file: String| file.replace("monitor = \"port\"", "monitor = \"msa\"");
    let used = "smtplb.toml:48:10: warning: monitor \"port\" is not used by any pool\n  \
         It has no effect.\n  Name it in a pool, or remove it.";
    let warning = "smtplb.toml:30:11: warning: pool \"mx-tls\" has a monitor of type = \"smtp\", and virtual server \
         \"smtps\" sends its members a PROXY protocol header\n  \
         Probes bring no header: a member that insists on one is found down.\n  \
         Use a monitor of type = \"tcp\".";
    let headed = said("proxy_protocol = \"v2\"\n\n", smtp);
    assert_eq!(headed, format!("{warning}\n{used}"));
    assert_eq!(said("snat = \"none\"\n\n", smtp), used);
}

#[test]
fn one_port_with_and_without_a_header() {
    let shared = |file: String| file.replace("10.0.0.21\"\nport = 465", "10.0.0.12\"\nport = 25");
    assert_eq!(
        said("proxy_protocol = \"v2\"\n\n", shared),
        "smtplb.toml:12:18: warning: virtual server \"smtps\" sends member 1 of pool \"mx-tls\" a PROXY protocol header, \
         and virtual server \"submission\" sends none\n  \
         A port expects one or it does not: connections of one of the two will fail.\n  \
         Give the mail server a port for each, and each port a pool."
    );
    assert_eq!(said("snat = \"none\"\n\n", shared), "");
}
