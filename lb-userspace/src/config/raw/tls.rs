//! The keys of TLS in `[virtual_server.NAME]`.

use crate::{
    config::{
        diagnostic::{Faults, did_you_mean, quoted},
        reader::{At, Field, Section},
    },
    model::{KeyExchange, Pin, StartTls, TlsVersion, UnknownName},
};

/// `client_tls` and `server_tls`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) enum Encryption {
    None,
    Implicit,
    StartTls,
}

const ENCRYPTION: &[(&str, Encryption)] = &[
    ("none", Encryption::None),
    ("implicit", Encryption::Implicit),
    ("starttls", Encryption::StartTls),
];

/// Towards clients.
pub(in crate::config) struct ClientKeys<'d> {
    pub(in crate::config) tls: Field<Encryption>,
    pub(in crate::config) starttls: Field<StartTls>,
    pub(in crate::config) plaintext_pool: Field<&'d str>,
    pub(in crate::config) certificates: Field<Vec<At<&'d str>>>,
    pub(in crate::config) min_version: Field<TlsVersion>,
    pub(in crate::config) key_exchange: Field<Vec<KeyExchange>>,
    pub(in crate::config) auth: Field<Asked>,
    pub(in crate::config) roots: Field<&'d str>,
    pub(in crate::config) unknown_name: Field<UnknownName>,
}

/// `client_auth`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) enum Asked {
    None,
    Request,
    Require,
}

/// Towards members.
pub(in crate::config) struct ServerKeys<'d> {
    pub(in crate::config) tls: Field<Encryption>,
    pub(in crate::config) verify: Field<Proof>,
    pub(in crate::config) name: Field<&'d str>,
    pub(in crate::config) roots: Field<&'d str>,
    pub(in crate::config) pins: Field<Vec<Pin>>,
    pub(in crate::config) certificate: Field<&'d str>,
}

/// `server_verify`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) enum Proof {
    Full,
    Pinned,
    None,
}

impl<'d> ClientKeys<'d> {
    pub(super) fn read(section: &mut Section<'d, '_>, faults: &mut Faults) -> Self {
        Self {
            tls: section.choice("client_tls", ENCRYPTION, &[], faults),
            starttls: section.choice(
                "starttls",
                &[("require", StartTls::Require), ("allow", StartTls::Allow)],
                &[],
                faults,
            ),
            plaintext_pool: section.string("plaintext_pool", "plaintext_pool = \"legacy\"", faults),
            certificates: section.strings("certificates", "certificates = [\"mail\"]", faults),
            min_version: section.choice(
                "client_tls_min",
                &[("1.2", TlsVersion::V1_2), ("1.3", TlsVersion::V1_3)],
                &[],
                faults,
            ),
            key_exchange: key_exchange(section, faults),
            auth: section.choice(
                "client_auth",
                &[
                    ("none", Asked::None),
                    ("request", Asked::Request),
                    ("require", Asked::Require),
                ],
                &[],
                faults,
            ),
            roots: file(section, "client_roots", faults),
            unknown_name: section.choice(
                "unknown_name",
                &[
                    ("default", UnknownName::Default),
                    ("refuse", UnknownName::Refuse),
                ],
                &[],
                faults,
            ),
        }
    }
}

impl<'d> ServerKeys<'d> {
    pub(super) fn read(section: &mut Section<'d, '_>, faults: &mut Faults) -> Self {
        Self {
            tls: section.choice("server_tls", ENCRYPTION, &[], faults),
            verify: section.choice(
                "server_verify",
                &[
                    ("full", Proof::Full),
                    ("pinned", Proof::Pinned),
                    ("none", Proof::None),
                ],
                &[],
                faults,
            ),
            name: name(section, faults),
            roots: file(section, "server_roots", faults),
            pins: pins(section, faults),
            certificate: section.string(
                "server_certificate",
                "server_certificate = \"mail\"",
                faults,
            ),
        }
    }
}

/// A path; what it means that there is none depends on the key.
fn file<'d>(
    section: &mut Section<'d, '_>,
    key: &'static str,
    faults: &mut Faults,
) -> Field<&'d str> {
    let example = format!("{key} = \"/etc/smtplb/roots.pem\"");
    section.string(key, &example, faults).and_then(|path| {
        if path.value.is_empty() || path.value.contains('\0') {
            faults.error(
                path.at,
                &section.object,
                format!("has {key} = {}, which is no path", quoted(path.value)),
                "No certificate could be verified with it.",
                format!("Write for example `{example}`."),
            );
            return None;
        }
        Some(path.value)
    })
}

fn key_exchange(section: &mut Section<'_, '_>, faults: &mut Faults) -> Field<Vec<KeyExchange>> {
    let example = "key_exchange = [\"x25519mlkem768\", \"x25519\"]";
    section
        .strings("key_exchange", example, faults)
        .and_then(|list| {
            let mut groups = Vec::with_capacity(list.value.len());
            for text in &list.value {
                let known = KeyExchange::ALL
                    .into_iter()
                    .find(|group| group.word() == text.value);
                match known {
                    Some(group) if !groups.contains(&group) => groups.push(group),
                    Some(_) => faults.error(
                        text.at,
                        &section.object,
                        format!("names {} twice in key_exchange", quoted(text.value)),
                        "The second has no effect.",
                        "Remove one of them.",
                    ),
                    None => {
                        let words = KeyExchange::ALL.map(KeyExchange::word);
                        let guess = did_you_mean(text.value, words);
                        faults.error(
                            text.at,
                            &section.object,
                            format!("has an unknown key_exchange {}{guess}", quoted(text.value)),
                            "Clients would not be offered what is meant.",
                            format!("Write some of {}.", words.map(quoted).join(", ")),
                        );
                    }
                }
            }
            if list.value.is_empty() {
                faults.error(
                    list.at,
                    &section.object,
                    "has no way to agree on keys in key_exchange",
                    "No handshake could succeed.",
                    format!("Write for example `{example}`, or remove it."),
                );
            }
            (!groups.is_empty() && groups.len() == list.value.len()).then_some(groups)
        })
}

fn name<'d>(section: &mut Section<'d, '_>, faults: &mut Faults) -> Field<&'d str> {
    let example = "server_name = \"mail.example.org\"";
    section
        .string("server_name", example, faults)
        .and_then(|name| {
            if rustls::pki_types::ServerName::try_from(name.value).is_err() {
                faults.error(
                    name.at,
                    &section.object,
                    format!(
                        "has server_name = {}, which is no name of a host",
                        quoted(name.value)
                    ),
                    "No certificate could be for it.",
                    format!("Write for example `{example}`."),
                );
                return None;
            }
            Some(name.value)
        })
}

fn pins(section: &mut Section<'_, '_>, faults: &mut Faults) -> Field<Vec<Pin>> {
    let example = "server_pins = [\"LCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCw=\"]";
    section
        .strings("server_pins", example, faults)
        .and_then(|list| {
            let mut pins = Vec::with_capacity(list.value.len());
            for text in &list.value {
                match Pin::from_base64(text.value) {
                    Some(pin) => pins.push(pin),
                    None => faults.error(
                        text.at,
                        &section.object,
                        format!("has the pin {}, which is no SHA-256 in base64", quoted(text.value)),
                        "No member could have this key.",
                        "Write the 44 characters of base64 of the key's SHA-256, as docs/configuration.md says how to get them.",
                    ),
                }
            }
            (pins.len() == list.value.len()).then_some(pins)
        })
}
