//! TLS towards clients: versions, groups, names, certificates of theirs and of ours.

use std::{
    fs,
    io::{Read, Write},
    sync::{Arc, OnceLock},
};

use rustls::{
    AlertDescription, ClientConfig, ClientConnection, DigitallySignedStruct, Error,
    SignatureScheme, StreamOwned,
    client::{
        ResolvesClientCert,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, UnixTime},
    sign::{CertifiedKey, SingleCertAndKey},
    version::{TLS12, TLS13},
};

use super::peers::{Kind, Lab, Listener, Setup, good};
use crate::{
    model::{ClientAuth, ClientTerms, KeyExchange, TlsVersion, UnknownName},
    smtp::end::End,
    tls::{
        ListenerTls, load_roots,
        tests::{Pair, terms},
    },
};

fn lab(listener: Listener) -> Lab {
    let setup = Setup {
        kind: Kind::Implicit,
        listener,
        ..Setup::default()
    };
    Lab::made(setup, &[good])
}

/// A certificate that clients may have, and nobody else.
pub(super) fn known() -> &'static Pair {
    static KNOWN: OnceLock<Pair> = OnceLock::new();
    KNOWN.get_or_init(|| Pair::new(&["client.example"]))
}

pub(super) fn asking(pair: &Pair, auth: ClientAuth) -> Arc<ListenerTls> {
    let terms = ClientTerms { auth, ..terms() };
    let roots = load_roots(Some(&known().path("chain.pem"))).unwrap();
    let own = [Arc::new(pair.load().unwrap())];
    Arc::new(ListenerTls::new(&terms, &own, Some(&roots)).unwrap())
}

const REQUIRE: Listener = |pair| {
    let roots = "of the test".into();
    asking(pair, ClientAuth::Require { roots })
};
const REQUEST: Listener = |pair| {
    let roots = "of the test".into();
    asking(pair, ClientAuth::Request { roots })
};

/// Shows this certificate, whoever it is asked for.
#[derive(Debug)]
struct Shows(SingleCertAndKey);

impl ResolvesClientCert for Shows {
    fn resolve(&self, hints: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.resolve(hints, schemes)
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn with_certificate(lab: &Lab, pair: &Pair) -> ClientConfig {
    let mut config = lab.tls_config();
    config.client_auth_cert_resolver = Arc::new(Shows(SingleCertAndKey::from(pair.certified())));
    config
}

/// Greeted, or why not.
fn greeted(lab: &Lab, config: &Arc<ClientConfig>, name: &str) -> Result<Tls, Error> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let connection = ClientConnection::new(config.clone(), name).unwrap();
    let mut stream = StreamOwned::new(connection, lab.connect().stream);
    let mut greeting = [0; 20];
    match stream.read(&mut greeting) {
        Ok(count) if greeting[..count].starts_with(b"220 good") => {
            stream.write_all(b"QUIT\r\n").unwrap();
            Ok(stream)
        }
        Ok(_) => panic!("{greeting:?}"),
        Err(error) => Err(error.downcast::<Error>().unwrap()),
    }
}

type Tls = StreamOwned<ClientConnection, std::net::TcpStream>;

#[test]
fn clients_show_certificates_where_they_must() {
    for (listener, without) in [(REQUIRE, false), (REQUEST, true)] {
        let lab = lab(listener);
        let none = Arc::new(lab.tls_config());
        assert_eq!(greeted(&lab, &none, "mx.example").is_ok(), without);
        let good = Arc::new(with_certificate(&lab, known()));
        assert!(greeted(&lab, &good, "mx.example").is_ok());
        let stranger = Arc::new(with_certificate(&lab, &Pair::new(&["client.example"])));
        let error = greeted(&lab, &stranger, "mx.example").err();
        assert!(matches!(error, Some(Error::AlertReceived(_))), "{error:?}");
        let ends = lab.ends.wait(3);
        let failed = ends.iter().filter(|end| end.end == End::TlsFailed);
        assert_eq!(failed.count(), if without { 1 } else { 2 });
    }
}

#[test]
fn a_client_gets_the_whole_chain_of_the_name_that_it_asks_for() {
    fn other() -> &'static Pair {
        static OTHER: OnceLock<Pair> = OnceLock::new();
        OTHER.get_or_init(|| Pair::new(&["other.example"]))
    }
    let lab = lab(|pair| {
        let chain = [pair.certificate.pem(), known().certificate.pem()].concat();
        fs::write(pair.path("chain.pem"), chain).unwrap();
        let all = [pair, other()].map(|pair| Arc::new(pair.load().unwrap()));
        Arc::new(ListenerTls::new(&terms(), &all, None).unwrap())
    });
    let mut config = lab.tls_config();
    config.dangerous().set_certificate_verifier(Knows::all());
    let config = Arc::new(config);
    let (first, second) = (lab.pair.certificate.der(), known().certificate.der());
    for (name, chain) in [
        ("mx.example", vec![first, second]),
        ("nobody.example", vec![first, second]),
        ("other.example", vec![other().certificate.der()]),
    ] {
        let stream = greeted(&lab, &config, name).unwrap();
        let shown: Vec<_> = stream.conn.peer_certificates().unwrap().iter().collect();
        assert_eq!(shown, chain, "{name}");
    }
}

#[test]
fn a_ticket_of_another_listener_shows_no_certificate() {
    for version in [&TLS12, &TLS13] {
        let (open, closed) = (lab(|pair| asking(pair, ClientAuth::None)), lab(REQUIRE));
        let mut config = open.tls_config_of(&[version]);
        config.dangerous().set_certificate_verifier(Knows::all());
        let config = Arc::new(config);
        for resumed in [false, true] {
            let mut stream = greeted(&open, &config, "mx.example").unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
            let kind = stream.conn.handshake_kind().unwrap();
            assert_eq!(
                kind == rustls::HandshakeKind::Resumed,
                resumed,
                "{version:?}"
            );
        }
        assert!(
            greeted(&closed, &config, "mx.example").is_err(),
            "{version:?}"
        );
    }
}

/// Takes every certificate, with these kinds of signatures.
#[derive(Debug)]
struct Knows(Vec<SignatureScheme>);

impl Knows {
    fn all() -> Arc<Self> {
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
        Arc::new(Self(algorithms.supported_schemes()))
    }
}

impl ServerCertVerifier for Knows {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.clone()
    }
}

#[test]
fn the_least_version_and_the_groups_are_the_listeners() {
    let lab = lab(|pair| {
        let terms = ClientTerms {
            min_version: TlsVersion::V1_3,
            key_exchange: vec![KeyExchange::Secp384r1],
            ..terms()
        };
        let own = [Arc::new(pair.load().unwrap())];
        Arc::new(ListenerTls::new(&terms, &own, None).unwrap())
    });
    let old = Arc::new(lab.tls_config_of(&[&TLS12]));
    assert_eq!(
        greeted(&lab, &old, "mx.example").err(),
        Some(Error::AlertReceived(AlertDescription::ProtocolVersion))
    );
    let new = Arc::new(lab.tls_config());
    let stream = greeted(&lab, &new, "mx.example").unwrap();
    let group = stream.conn.negotiated_key_exchange_group().unwrap();
    assert_eq!(group.name(), rustls::NamedGroup::secp384r1);
}

#[test]
fn unknown_names_are_refused_where_the_listener_is_strict() {
    let lab = lab(|pair| {
        let terms = ClientTerms {
            unknown_name: UnknownName::Refuse,
            ..terms()
        };
        let own = [Arc::new(pair.load().unwrap())];
        Arc::new(ListenerTls::new(&terms, &own, None).unwrap())
    });
    let config = Arc::new(lab.tls_config());
    assert_eq!(
        greeted(&lab, &config, "other.example").err(),
        Some(Error::AlertReceived(AlertDescription::UnrecognisedName))
    );
    for name in ["mx.example", "MX.Example"] {
        assert!(greeted(&lab, &config, name).is_ok(), "{name}");
    }
    let mut config = lab.tls_config();
    config.enable_sni = false;
    let nameless = greeted(&lab, &Arc::new(config), "mx.example");
    assert!(nameless.is_ok(), "who asks for no name gets the first");
}

#[test]
fn of_two_certificates_for_one_name_each_client_gets_what_it_can_verify() {
    let lab = lab(|pair| {
        let rsa = Pair::of(&["mx.example"], &rcgen::PKCS_RSA_SHA256, |_| {});
        let both = [pair, &rsa].map(|pair| Arc::new(pair.load().unwrap()));
        Arc::new(ListenerTls::new(&terms(), &both, None).unwrap())
    });
    for (schemes, rsa) in [
        (vec![SignatureScheme::ECDSA_NISTP256_SHA256], false),
        (vec![SignatureScheme::RSA_PSS_SHA256], true),
        (
            vec![
                SignatureScheme::RSA_PSS_SHA256,
                SignatureScheme::ECDSA_NISTP256_SHA256,
            ],
            false,
        ),
    ] {
        let mut config = lab.tls_config();
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(Knows(schemes)));
        let stream = greeted(&lab, &Arc::new(config), "mx.example").unwrap();
        let shown = &stream.conn.peer_certificates().unwrap()[0];
        assert_eq!(shown != lab.pair.certificate.der(), rsa);
    }
}
