//! TLS on both sides of a virtual server.

use std::{collections::BTreeSet, path::Path};

use super::{Known, all, reference, virtual_server::place};
use crate::{
    config::{
        diagnostic::{Faults, quoted},
        raw::{self, Asked, Encryption, Proof},
        reader::{At, Field},
    },
    model::{
        ClientAuth, ClientTerms, ClientTls, KeyExchange, Name, ServerTerms, ServerTls, StartTls,
        TlsVersion, UnknownName, Verify,
    },
};

/// The keys that a virtual server of the kernel plane cannot have, and where they stand.
pub(super) fn places(raw: &raw::VirtualServer<'_>) -> Vec<(&'static str, Option<usize>)> {
    let (client, server) = (&raw.client, &raw.server);
    let mut keys = client_keys(client).to_vec();
    keys.insert(0, ("client_tls", place(&client.tls)));
    keys.push(("server_tls", place(&server.tls)));
    keys.extend(server_keys(server));
    keys.push(("xclient", place(&raw.xclient)));
    keys
}

/// Every certificate that a virtual server names.
pub(super) fn certificates_named<'r>(
    raw: &'r raw::VirtualServer<'_>,
) -> impl Iterator<Item = &'r str> {
    let towards_clients = raw.client.certificates.get().into_iter().flatten();
    let towards_members = raw.server.certificate.get().copied();
    towards_clients
        .map(|name| name.value)
        .chain(towards_members)
}

fn client_keys(keys: &raw::ClientKeys<'_>) -> [(&'static str, Option<usize>); 8] {
    [
        ("starttls", place(&keys.starttls)),
        ("plaintext_pool", place(&keys.plaintext_pool)),
        ("certificates", place(&keys.certificates)),
        ("client_tls_min", place(&keys.min_version)),
        ("key_exchange", place(&keys.key_exchange)),
        ("client_auth", place(&keys.auth)),
        ("client_roots", place(&keys.roots)),
        ("unknown_name", place(&keys.unknown_name)),
    ]
}

fn server_keys(keys: &raw::ServerKeys<'_>) -> [(&'static str, Option<usize>); 5] {
    [
        ("server_verify", place(&keys.verify)),
        ("server_name", place(&keys.name)),
        ("server_roots", place(&keys.roots)),
        ("server_pins", place(&keys.pins)),
        ("server_certificate", place(&keys.certificate)),
    ]
}

/// Towards clients.
pub(super) fn client(
    raw: &raw::VirtualServer<'_>,
    known: &Known<'_, '_>,
    directory: &Path,
    faults: &mut Faults,
) -> Option<ClientTls> {
    let keys = &raw.client;
    let tls = keys.tls.clone().or(Encryption::None);
    if let (Some(Encryption::None | Encryption::Implicit), Some(at)) = (tls, place(&keys.starttls))
    {
        faults.error(
            at,
            &raw.object,
            "has starttls without client_tls = \"starttls\"",
            "Clients would not be offered STARTTLS.",
            "Remove it, or set client_tls = \"starttls\".",
        );
    }
    let plaintext_pool = plaintext_pool(raw, tls, known, faults);
    let Some(tls) = tls else {
        // Which certificates it names is a question of its own.
        if place(&keys.certificates).is_some() {
            certificates(raw, known, faults);
        }
        return None;
    };
    match tls {
        Encryption::None => {
            // Those of STARTTLS were judged above.
            for (key, at) in &client_keys(keys)[2..] {
                let Some(at) = *at else { continue };
                faults.error(
                    at,
                    &raw.object,
                    format!("has {key} without client_tls"),
                    "Clients would not be offered TLS.",
                    "Remove it, or set client_tls = \"starttls\" or client_tls = \"implicit\".",
                );
            }
            Some(ClientTls::None)
        }
        Encryption::Implicit => Some(ClientTls::Implicit(terms(raw, known, directory, faults)?)),
        Encryption::StartTls => {
            let terms = terms(raw, known, directory, faults);
            let policy = keys.starttls.clone().or(StartTls::Require);
            Some(ClientTls::StartTls {
                policy: policy?,
                plaintext_pool: plaintext_pool?,
                terms: terms?,
            })
        }
    }
}

/// The pool for clients that stay in plaintext.
fn plaintext_pool(
    raw: &raw::VirtualServer<'_>,
    tls: Option<Encryption>,
    known: &Known<'_, '_>,
    faults: &mut Faults,
) -> Option<Option<Name>> {
    let keys = &raw.client;
    let given = match &keys.plaintext_pool {
        Field::Wrong => return None,
        Field::Absent => return Some(None),
        Field::Is(given) => given,
    };
    let policy = keys.starttls.clone().or(StartTls::Require);
    let allows = tls == Some(Encryption::StartTls) && policy == Some(StartTls::Allow);
    if !allows && tls.is_some() && policy.is_some() {
        faults.error(
            given.at,
            &raw.object,
            "has plaintext_pool without client_tls = \"starttls\" and starttls = \"allow\"",
            "There are no clients that could have chosen TLS and did not.",
            "Remove it, or set both.",
        );
        return None;
    }
    if raw.pool.get() == Some(&given.value) {
        faults.error(
            given.at,
            &raw.object,
            format!(
                "has the pool {} as its plaintext_pool, too",
                quoted(given.value)
            ),
            "Clients in plaintext would be sent where they are already.",
            "Remove it, or name another pool.",
        );
        return None;
    }
    let names = known.pools.keys().copied();
    let consequence = "Clients that stay in plaintext would be refused.";
    reference(given, "pool", names, &raw.object, consequence, faults).map(Some)
}

fn terms(
    raw: &raw::VirtualServer<'_>,
    known: &Known<'_, '_>,
    directory: &Path,
    faults: &mut Faults,
) -> Option<ClientTerms> {
    let keys = &raw.client;
    let certificates = certificates(raw, known, faults);
    let auth = auth(raw, directory, faults);
    Some(ClientTerms {
        certificates: certificates?,
        min_version: keys.min_version.clone().or(TlsVersion::V1_2)?,
        key_exchange: keys.key_exchange.clone().or(KeyExchange::ALL.to_vec())?,
        auth: auth?,
        unknown_name: keys.unknown_name.clone().or(UnknownName::Default)?,
    })
}

fn auth(raw: &raw::VirtualServer<'_>, directory: &Path, faults: &mut Faults) -> Option<ClientAuth> {
    let keys = &raw.client;
    let asked = keys.auth.clone().or(Asked::None)?;
    let word = match (asked, &keys.roots) {
        (_, Field::Wrong) => return None,
        (Asked::None, Field::Absent) => return Some(ClientAuth::None),
        (Asked::None, Field::Is(roots)) => {
            faults.error(
                roots.at,
                &raw.object,
                "has client_roots without client_auth",
                "Clients would not be asked for a certificate.",
                "Remove it, or set client_auth = \"request\" or client_auth = \"require\".",
            );
            return None;
        }
        (Asked::Request, Field::Is(roots)) => {
            let roots = directory.join(roots.value);
            return Some(ClientAuth::Request { roots });
        }
        (Asked::Require, Field::Is(roots)) => {
            let roots = directory.join(roots.value);
            return Some(ClientAuth::Require { roots });
        }
        (Asked::Request, Field::Absent) => "request",
        (Asked::Require, Field::Absent) => "require",
    };
    faults.error(
        place(&keys.auth).unwrap_or(raw.name.at),
        &raw.object,
        format!("has no client_roots for its client_auth = \"{word}\""),
        "No certificate of a client could be verified.",
        "Add `client_roots`, a PEM file with the authorities that vouch for clients.",
    );
    None
}

fn certificates(
    raw: &raw::VirtualServer<'_>,
    known: &Known<'_, '_>,
    faults: &mut Faults,
) -> Option<Vec<Name>> {
    let (at, list) = match &raw.client.certificates {
        Field::Wrong => return None,
        Field::Absent => (place(&raw.client.tls).unwrap_or(raw.name.at), &[][..]),
        Field::Is(list) => (list.at, &list.value[..]),
    };
    let consequence = "Clients could not be offered TLS.";
    if list.is_empty() {
        let remedy =
            "Add for example `certificates = [\"mail\"]` and a table `[certificate.mail]`.";
        faults.error(
            at,
            &raw.object,
            "has no certificates for its client_tls",
            consequence,
            remedy,
        );
        return None;
    }
    let mut seen = BTreeSet::new();
    all(list.iter().map(|given| {
        if !seen.insert(given.value) {
            faults.error(
                given.at,
                &raw.object,
                format!("names the certificate {} twice", quoted(given.value)),
                "The second has no effect.",
                "Remove one of them.",
            );
            return None;
        }
        certificate(given, raw, known, consequence, faults)
    }))
}

fn certificate(
    given: &At<&str>,
    raw: &raw::VirtualServer<'_>,
    known: &Known<'_, '_>,
    consequence: &str,
    faults: &mut Faults,
) -> Option<Name> {
    let names = known.certificates.iter().copied();
    reference(
        given,
        "certificate",
        names,
        &raw.object,
        consequence,
        faults,
    )
}

/// Towards members.
pub(super) fn server(
    raw: &raw::VirtualServer<'_>,
    known: &Known<'_, '_>,
    directory: &Path,
    faults: &mut Faults,
) -> Option<ServerTls> {
    let keys = &raw.server;
    let tls = keys.tls.clone().or(Encryption::None)?;
    if tls == Encryption::None {
        let mut clean = true;
        for (key, at) in server_keys(keys) {
            let Some(at) = at else { continue };
            clean = false;
            faults.error(
                at,
                &raw.object,
                format!("has {key} without server_tls"),
                "Members are spoken to in plaintext; nothing is shown or verified.",
                "Remove it, or set server_tls = \"starttls\" or server_tls = \"implicit\".",
            );
        }
        return clean.then_some(ServerTls::None);
    }
    let verify = verify(raw, directory, faults);
    let certificate = match &keys.certificate {
        Field::Wrong => None,
        Field::Absent => Some(None),
        Field::Is(given) => {
            let consequence = "Members that ask for a certificate would refuse the connection.";
            certificate(given, raw, known, consequence, faults).map(Some)
        }
    };
    let name = match &keys.name {
        Field::Wrong => None,
        Field::Absent => Some(None),
        Field::Is(given) => Some(Some(given.value.trim_end_matches('.').to_owned())),
    };
    let terms = ServerTerms {
        verify: verify?,
        name: name?,
        certificate: certificate?,
    };
    Some(match tls {
        Encryption::Implicit => ServerTls::Implicit(terms),
        _ => ServerTls::StartTls(terms),
    })
}

fn verify(raw: &raw::VirtualServer<'_>, directory: &Path, faults: &mut Faults) -> Option<Verify> {
    let keys = &raw.server;
    let proof = keys.verify.clone().or(Proof::Full)?;
    let mut clean = true;
    for (key, at, proper, word) in [
        ("server_roots", place(&keys.roots), Proof::Full, "full"),
        ("server_pins", place(&keys.pins), Proof::Pinned, "pinned"),
    ] {
        let Some(at) = at.filter(|_| proof != proper) else {
            continue;
        };
        clean = false;
        faults.error(
            at,
            &raw.object,
            format!("has {key} without server_verify = \"{word}\""),
            "It would have no effect.",
            format!("Remove it, or set server_verify = \"{word}\"."),
        );
    }
    let verify = match (proof, &keys.roots, &keys.pins) {
        (Proof::Full, Field::Wrong, _) | (Proof::Pinned, _, Field::Wrong) => return None,
        (Proof::Full, roots, _) => Verify::Full {
            roots: roots.get().map(|roots| directory.join(roots)),
        },
        (Proof::Pinned, _, Field::Is(pins)) if !pins.value.is_empty() => {
            Verify::Pinned(pins.value.clone())
        }
        (Proof::Pinned, ..) => {
            faults.error(
                place(&keys.pins).or(place(&keys.verify)).unwrap_or(raw.name.at),
                &raw.object,
                "has no server_pins for its server_verify = \"pinned\"",
                "No member would be accepted.",
                "Add `server_pins`, a list of SHA-256 of the members' public keys, or set server_verify = \"full\".",
            );
            return None;
        }
        (Proof::None, ..) => {
            faults.warning(
                place(&keys.verify).unwrap_or(raw.name.at),
                &raw.object,
                "does not verify its members: server_verify = \"none\"",
                "Whoever sits between this box and a member can read and change all mail, TLS or not.",
                "Set server_verify = \"pinned\" with the members' keys, or \"full\".",
            );
            Verify::None
        }
    };
    clean.then_some(verify)
}
