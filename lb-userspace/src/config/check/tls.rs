//! TLS on both sides of a virtual server.

use std::{collections::BTreeSet, path::Path};

use super::{Known, all, reference, virtual_server::place};
use crate::{
    config::{
        diagnostic::{Faults, quoted},
        raw::{self, Encryption, Proof},
        reader::{At, Field},
    },
    model::{ClientTerms, ClientTls, Name, ServerTerms, ServerTls, StartTls, Verify},
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

fn client_keys(keys: &raw::ClientKeys<'_>) -> [(&'static str, Option<usize>); 2] {
    [
        ("starttls", place(&keys.starttls)),
        ("certificates", place(&keys.certificates)),
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
    let Some(tls) = tls else {
        // Which certificates it names is a question of its own.
        if place(&keys.certificates).is_some() {
            certificates(raw, known, faults);
        }
        return None;
    };
    match tls {
        Encryption::None => {
            if let Some(at) = place(&keys.certificates) {
                faults.error(
                    at,
                    &raw.object,
                    "has certificates without client_tls",
                    "Clients would not be offered TLS.",
                    "Remove them, or set client_tls = \"starttls\" or client_tls = \"implicit\".",
                );
            }
            Some(ClientTls::None)
        }
        Encryption::Implicit => Some(ClientTls::Implicit(terms(raw, known, faults)?)),
        Encryption::StartTls => {
            let terms = terms(raw, known, faults);
            let policy = keys.starttls.clone().or(StartTls::Require);
            Some(ClientTls::StartTls {
                policy: policy?,
                terms: terms?,
            })
        }
    }
}

fn terms(
    raw: &raw::VirtualServer<'_>,
    known: &Known<'_, '_>,
    faults: &mut Faults,
) -> Option<ClientTerms> {
    Some(ClientTerms {
        certificates: certificates(raw, known, faults)?,
    })
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
