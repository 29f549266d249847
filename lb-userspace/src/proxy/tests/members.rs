//! TLS towards members: who is taken for what, and that nothing goes there in clear.

use std::sync::Arc;

use super::{
    listeners::{asking, known},
    peers::{Kind, Lab, Member, Script, Server, Setup, busy, good, implicit, starttls},
};
use crate::{
    model::{ClientAuth, Pin, ServerTerms, StartTls, Verify},
    proxy::MemberSecurity,
    smtp::end::End,
    tls::{Loaded, MemberTls, load_roots, tests::Pair},
};

const MESSAGE: &str = "Subject: x\r\n\r\nx\r\n.\r\n";

fn member_tls(pair: &Pair, verify: Verify, name: Option<&str>) -> Arc<MemberTls> {
    let roots = load_roots(Some(&pair.path("chain.pem"))).unwrap();
    let terms = ServerTerms {
        verify,
        name: name.map(str::to_owned),
        certificate: None,
    };
    Arc::new(MemberTls::new(&terms, Some(&roots), None).unwrap())
}

fn full(pair: &Pair, name: Option<&str>) -> Arc<MemberTls> {
    member_tls(pair, Verify::Full { roots: None }, name)
}

fn pinned(pair: &Pair, pin: Pin) -> MemberSecurity {
    MemberSecurity::StartTls(member_tls(pair, Verify::Pinned(vec![pin]), None))
}

pub(super) const IMPLICIT: Server = |pair| MemberSecurity::Implicit(full(pair, None));
const STARTTLS: Server = |pair| MemberSecurity::StartTls(full(pair, Some("member.example")));

fn lab(kind: Kind, server: Server, members: &[Script]) -> Lab {
    let setup = Setup {
        kind,
        server,
        ..Setup::default()
    };
    Lab::made(setup, members)
}

/// In TLS, with whoever shows a certificate that is known.
fn demanding(member: &mut Member) {
    let roots = "of the test".into();
    let tls = asking(
        &Pair::new(&["member.example"]),
        ClientAuth::Require { roots },
    );
    member.tls = tls.config.clone();
    implicit(member);
}

#[test]
fn members_are_shown_the_certificate_that_they_demand() {
    fn showing(certificate: Option<&Loaded>) -> MemberSecurity {
        let terms = ServerTerms {
            verify: Verify::None,
            name: None,
            certificate: None,
        };
        MemberSecurity::Implicit(Arc::new(MemberTls::new(&terms, None, certificate).unwrap()))
    }
    let with: Server = |_| showing(Some(&known().load().unwrap()));
    let with = lab(Kind::Plain, with, &[demanding]);
    assert_eq!(with.connect().reply(), "220 good ESMTP\r\n");
    let without = lab(Kind::Plain, |_| showing(None), &[demanding]);
    assert!(without.connect().reply().starts_with("421 4.3.2 "));
}

#[test]
fn every_kind_of_client_reaches_every_kind_of_member() {
    for (server, script) in [(IMPLICIT, implicit as Script), (STARTTLS, starttls)] {
        let kinds = [
            Kind::Plain,
            Kind::Implicit,
            Kind::StartTls(StartTls::Require),
            Kind::StartTls(StartTls::Allow),
        ];
        for kind in kinds {
            let lab = lab(kind, server, &[script]);
            let mut plain = lab.connect();
            if let Kind::StartTls(_) = kind {
                assert_eq!(plain.reply(), "220 good ESMTP\r\n");
                let ehlo = plain.ask("EHLO clear.example");
                assert!(ehlo.ends_with("250 STARTTLS\r\n"), "{ehlo}");
                assert!(!ehlo.contains("CHUNKING"), "learned in clear: {ehlo}");
                assert!(!ehlo.contains("REQUIRETLS"), "{ehlo}");
                plain.expect("STARTTLS", "220 ");
            }
            let ehlo = match kind {
                Kind::Plain => {
                    assert_eq!(plain.reply(), "220 good ESMTP\r\n");
                    let ehlo = plain.ask("EHLO c.example");
                    plain.expect("MAIL FROM:<a@b> REQUIRETLS", "530 5.7.30 ");
                    plain.deliver(MESSAGE);
                    plain.expect("QUIT", "221 ");
                    ehlo
                }
                _ => {
                    let mut client = lab.secure(plain);
                    if let Kind::Implicit = kind {
                        assert_eq!(client.reply(), "220 good ESMTP\r\n");
                    }
                    let ehlo = client.ask("EHLO c.example");
                    client.expect("MAIL FROM:<a@b> REQUIRETLS", "250 ");
                    client.expect("RSET", "250 ");
                    client.deliver(MESSAGE);
                    client.expect("QUIT", "221 ");
                    ehlo
                }
            };
            let requiretls = !matches!(kind, Kind::Plain);
            assert_eq!(ehlo.contains("REQUIRETLS"), requiretls, "{ehlo}");
            let seen = lab.seen();
            assert!(seen.contains("EHLO c.example\r\n"), "{seen}");
            assert!(
                seen.ends_with(&format!("DATA\r\n{MESSAGE}QUIT\r\nFIN")),
                "{seen}"
            );
            let end = lab.end();
            assert_eq!(end.end, End::Quit);
            let with_member = end.member_tls.expect("the log knows of it");
            assert_eq!(with_member.version, "TLSv1.3");
        }
    }
}

#[test]
fn the_member_is_asked_for_tls_before_it_hears_anything_of_the_client() {
    let lab = lab(Kind::Plain, STARTTLS, &[starttls]);
    let mut client = lab.connect();
    client.reply();
    client.expect("HELO c.example", "250 ");
    client.expect("QUIT", "221 ");
    let own = "EHLO [127.0.0.1]\r\nSTARTTLS\r\n";
    assert_eq!(lab.seen(), format!("{own}HELO c.example\r\nQUIT\r\nFIN"));
}

/// STARTTLS is not offered.
fn clear(member: &mut Member) {
    member.say("220 good ESMTP\r\n");
    let mut seen = Vec::new();
    while let Some(line) = member.line() {
        seen.extend_from_slice(&line);
        member.say("250 good\r\n");
    }
    let _ = member.log.send(seen);
}

/// Offered, and refused.
fn unready(member: &mut Member) {
    refuse(member, "454 not now\r\n");
}

/// A reply for after the handshake, in clear behind the 220.
fn injecting(member: &mut Member) {
    refuse(member, "220 go\r\n250-evil\r\n250 AUTH PLAIN\r\n");
}

/// No handshake behind the 220, but words.
fn talking(member: &mut Member) {
    refuse(member, "220 go\r\n");
    member.say("250 evil\r\n");
}

fn refuse(member: &mut Member, word: &str) {
    member.say("220 good ESMTP\r\n");
    let mut seen = Vec::new();
    while let Some(line) = member.line() {
        seen.extend_from_slice(&line);
        match line.starts_with(b"STARTTLS") {
            true => member.say(word),
            false => member.say("250-good\r\n250 STARTTLS\r\n"),
        };
        if line.starts_with(b"STARTTLS") {
            break;
        }
    }
    while let Some(line) = member.line() {
        seen.extend_from_slice(&line);
    }
    let _ = member.log.send(seen);
}

#[test]
fn a_member_that_fails_tls_is_passed_over_and_never_spoken_to_in_clear() {
    let wrong_name: Server = |pair| MemberSecurity::StartTls(full(pair, Some("other.example")));
    let stranger: Server = |_| MemberSecurity::StartTls(full(&Pair::new(&["x.example"]), None));
    let other_pin: Server = |pair| pinned(pair, Pin([7; 32]));
    let wrong_implicit: Server = |pair| MemberSecurity::Implicit(full(pair, Some("other.example")));
    for (what, server, script, relays) in [
        ("no STARTTLS", STARTTLS, clear as Script, true),
        ("refused STARTTLS", STARTTLS, unready, true),
        ("injection", STARTTLS, injecting, true),
        ("words for a handshake", STARTTLS, talking, true),
        ("another name", wrong_name, starttls, true),
        ("another authority", stranger, starttls, true),
        ("another key", other_pin, starttls, true),
        ("another name, implicit", wrong_implicit, implicit, false),
        ("plaintext for implicit", IMPLICIT, good, false),
    ] {
        let lab = lab(Kind::Plain, server, &[script]);
        let mut client = lab.connect();
        if relays {
            assert_eq!(client.reply(), "220 good ESMTP\r\n", "{what}");
        }
        client.send("EHLO secret.example\r\nMAIL FROM:<secret@b>\r\n");
        let heard = String::from_utf8(client.rest()).unwrap();
        assert!(heard.starts_with("421 4.3.2 "), "{what}: {heard}");
        assert_eq!(lab.end().end, End::NoMember, "{what}");
        assert_eq!(lab.events()["member-unfit"], 1, "{what}");
        if !script_is_silent(script) {
            let seen = lab.seen();
            assert!(!seen.contains("secret"), "{what}: {seen}");
        }
    }
}

/// Does it report nothing when its handshake fails?
fn script_is_silent(script: Script) -> bool {
    std::ptr::fn_addr_eq(script, implicit as Script)
}

#[test]
fn the_next_member_serves_where_one_fails_tls() {
    for (first, what) in [
        (clear as Script, "no STARTTLS"),
        (injecting, "injection"),
        (busy, "busy"),
    ] {
        let lab = lab(Kind::Plain, STARTTLS, &[first, starttls]);
        // Round robin: one of two clients begins with the first.
        for _ in 0..2 {
            let mut client = lab.connect();
            assert_eq!(client.reply(), "220 good ESMTP\r\n", "{what}");
            client.expect("EHLO c.example", "250");
            client.deliver(MESSAGE);
            client.expect("QUIT", "221 ");
        }
        assert!(lab.events()["member-passed-over"] > 0, "{what}");
    }
}

#[test]
fn a_pin_is_enough_and_none_takes_everybody() {
    let right: Server = |pair| pinned(pair, pair.pin());
    let none: Server = |pair| MemberSecurity::StartTls(member_tls(pair, Verify::None, None));
    for server in [right, none] {
        let lab = lab(Kind::Implicit, server, &[starttls]);
        let mut client = lab.secure(lab.connect());
        client.reply();
        let ehlo = client.ask("EHLO c.example");
        assert!(!ehlo.contains("REQUIRETLS"), "no name is proven: {ehlo}");
        client.expect("MAIL FROM:<a@b> REQUIRETLS", "530 5.7.30 ");
        client.deliver(MESSAGE);
        client.expect("QUIT", "221 ");
    }
}

#[test]
fn a_large_message_goes_whole_through_two_tls() {
    let lab = lab(Kind::Implicit, IMPLICIT, &[implicit]);
    let mut client = lab.secure(lab.connect());
    client.reply();
    client.expect("EHLO c.example", "250");
    let message = format!("{}.\r\n", "0123456789abcdef0123456789\r\n".repeat(400_000));
    client.deliver(&message);
    client.expect("QUIT", "221 ");
    let seen = lab.seen();
    assert!(seen.ends_with(&format!("DATA\r\n{message}QUIT\r\nFIN")));
}

#[test]
fn xclient_tells_the_member_who_the_client_is() {
    let setup = Setup {
        kind: Kind::StartTls(StartTls::Require),
        server: STARTTLS,
        xclient: true,
        ..Setup::default()
    };
    let lab = Lab::made(setup, &[starttls]);
    let mut client = lab.connect();
    assert_eq!(client.reply(), "220 good ESMTP\r\n");
    let ehlo = client.ask("EHLO a=b");
    assert!(!ehlo.contains("XCLIENT"), "{ehlo}");
    client.expect("XCLIENT ADDR=10.0.0.1", "550 ");
    client.expect("STARTTLS", "220 ");
    let mut client = lab.secure(client);
    client.expect("EHLO again", "250");
    client.deliver(MESSAGE);
    client.expect("QUIT", "221 ");
    let own = "EHLO [127.0.0.1]\r\nSTARTTLS\r\n";
    let xclient = "XCLIENT ADDR=127.0.0.1 HELO=a+3Db\r\n";
    let seen = lab.seen();
    let start = format!("{own}EHLO a=b\r\n{xclient}EHLO a=b\r\nEHLO again\r\nMAIL");
    assert!(seen.starts_with(&start), "{seen}");
}

/// Takes one EHLO per connection, as OpenSMTPD does.
fn strict(member: &mut Member) {
    member.say("220 good ESMTP\r\n");
    let (mut seen, mut greeted) = (Vec::new(), false);
    while let Some(line) = member.line() {
        seen.extend_from_slice(&line);
        member.say(match (line.starts_with(b"EHLO"), greeted) {
            (true, true) => "503 5.5.1 Already identified\r\n",
            (true, false) => "250-good\r\n250 SIZE\r\n",
            (false, _) => "250 ok\r\n",
        });
        greeted |= line.starts_with(b"EHLO");
    }
    let _ = member.log.send(seen);
}

#[test]
fn a_member_that_knows_one_ehlo_gets_another_connection_behind_the_border() {
    let kind = Kind::StartTls(StartTls::Require);
    let lab = lab(kind, |_| MemberSecurity::None, &[strict]);
    let mut client = lab.connect();
    client.reply();
    client.expect("EHLO clear.example", "250");
    client.expect("STARTTLS", "220 ");
    let mut client = lab.secure(client);
    assert_eq!(client.ask("EHLO c.example"), "250-good\r\n250 SIZE\r\n");
    client.expect("EHLO c.example", "503 5.5.1 ");
    client.expect("MAIL FROM:<a@b>", "250 ");
    let first = lab.seen();
    assert_eq!(first, "EHLO clear.example\r\nEHLO c.example\r\n");
    drop(client);
    assert_eq!(
        lab.seen(),
        "EHLO c.example\r\nEHLO c.example\r\nMAIL FROM:<a@b>\r\n"
    );
}

#[test]
fn nobody_passes_xclient_by_without_a_name() {
    let setup = Setup {
        server: IMPLICIT,
        xclient: true,
        ..Setup::default()
    };
    let lab = Lab::made(setup, &[implicit]);
    let mut client = lab.connect();
    client.reply();
    client.expect("MAIL FROM:<a@b>", "503 ");
    client.expect("NOOP", "250 ");
    client.expect("HELO c.example", "250 ok");
    client.deliver(MESSAGE);
    client.expect("QUIT", "221 ");
    let seen = lab.seen();
    let xclient = "XCLIENT ADDR=127.0.0.1 HELO=c.example\r\n";
    let start = format!("NOOP\r\nEHLO c.example\r\n{xclient}HELO c.example\r\nMAIL");
    assert!(seen.starts_with(&start), "{seen}");
}

#[test]
fn without_xclient_a_client_is_served_with_one_ehlo() {
    for (command, reply, reached) in [
        (
            "EHLO c.example",
            "250-good\r\n250 SIZE\r\n",
            "EHLO c.example",
        ),
        ("HELO c.example", "250 good\r\n", "EHLO c.example"),
    ] {
        let setup = Setup {
            xclient: true,
            ..Setup::default()
        };
        let lab = Lab::made(setup, &[strict]);
        let mut client = lab.connect();
        client.reply();
        assert_eq!(client.ask(command), reply);
        client.expect("MAIL FROM:<a@b>", "250 ");
        drop(client);
        assert_eq!(lab.seen(), format!("{reached}\r\nMAIL FROM:<a@b>\r\n"));
    }
}
