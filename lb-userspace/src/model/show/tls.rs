//! The keys of TLS on both sides of a virtual server.

use super::{Table, path};
use crate::model::{ClientAuth, ClientTls, ServerTls, StartTls, TlsVersion, UnknownName, Verify};

/// Towards clients.
pub(super) fn client(table: &mut Table, tls: &ClientTls) {
    table.word(
        "client_tls",
        match tls {
            ClientTls::None => "none",
            ClientTls::Implicit(_) => "implicit",
            ClientTls::StartTls { .. } => "starttls",
        },
    );
    if let ClientTls::StartTls { policy, .. } = tls {
        table.word(
            "starttls",
            match policy {
                StartTls::Require => "require",
                StartTls::Allow => "allow",
            },
        );
    }
    if let Some(pool) = tls.plaintext_pool() {
        table.word("plaintext_pool", pool);
    }
    if let Some(terms) = tls.terms() {
        let names = terms.certificates.iter().map(|name| &**name);
        table.list("certificates", names);
        table.word(
            "client_tls_min",
            match terms.min_version {
                TlsVersion::V1_2 => "1.2",
                TlsVersion::V1_3 => "1.3",
            },
        );
        let groups = terms.key_exchange.iter().map(|group| group.word());
        table.list("key_exchange", groups);
        table.word(
            "client_auth",
            match terms.auth {
                ClientAuth::None => "none",
                ClientAuth::Request { .. } => "request",
                ClientAuth::Require { .. } => "require",
            },
        );
        if let Some(roots) = terms.auth.roots() {
            table.word("client_roots", &path(roots));
        }
        table.word(
            "unknown_name",
            match terms.unknown_name {
                UnknownName::Default => "default",
                UnknownName::Refuse => "refuse",
            },
        );
    }
}

/// Towards members.
pub(super) fn server(table: &mut Table, tls: &ServerTls) {
    table.word("server_tls", tls.word());
    let Some(terms) = tls.terms() else { return };
    table.word(
        "server_verify",
        match terms.verify {
            Verify::Full { .. } => "full",
            Verify::Pinned(_) => "pinned",
            Verify::None => "none",
        },
    );
    match &terms.verify {
        Verify::Full { roots: Some(roots) } => table.word("server_roots", &path(roots)),
        Verify::Pinned(pins) => {
            let pins: Vec<_> = pins.iter().map(ToString::to_string).collect();
            table.list("server_pins", pins.iter().map(String::as_str));
        }
        Verify::Full { roots: None } | Verify::None => {}
    }
    if let Some(name) = &terms.name {
        table.word("server_name", name);
    }
    if let Some(name) = &terms.certificate {
        table.word("server_certificate", name);
    }
}
