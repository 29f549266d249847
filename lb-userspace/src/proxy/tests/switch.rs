//! Clients that stay in plaintext, and the pool for them.

use std::sync::Arc;

use super::peers::{Client, Kind, Lab, Member, PATIENCE, Script, Setup, good, starttls};
use crate::{
    model::{ServerTerms, StartTls, Terms, Verify},
    proxy::MemberSecurity,
    smtp::end::End,
    tls::{MemberTls, load_roots},
};

/// Knows less than [`good`], and some things that that does not know.
pub(super) fn legacy(member: &mut Member) {
    member.say("220 legacy ESMTP\r\n");
    let mut seen = Vec::new();
    while let Some(line) = member.line() {
        seen.extend_from_slice(&line);
        member.say(match line.get(..4) {
            Some(b"EHLO") => "250-legacy\r\n250-SIZE 1000\r\n250-DSN\r\n250 PIPELINING\r\n",
            Some(b"DATA") => "354 go\r\n",
            Some(b"RSET") => "250 reset\r\n",
            _ => "250 2.0.0 taken\r\n",
        });
    }
    let _ = member.log.send(seen);
}

/// Greets and then is silent.
fn mute(member: &mut Member) {
    member.say("554 no\r\n");
}

fn setup(plaintext: &'static [Script]) -> Setup {
    Setup {
        kind: Kind::StartTls(StartTls::Allow),
        plaintext: Some(plaintext),
        ..Setup::default()
    }
}

/// What a member was told by a session, not by whoever asked what it knows.
fn told(lab: &Lab) -> String {
    loop {
        let seen = lab.seen();
        if !seen.starts_with("EHLO [127.0.0.1]\r\nQUIT") {
            return seen;
        }
    }
}

#[test]
fn the_first_mail_command_decides() {
    for command in ["MAIL FROM:<a@b>", "AUTH PLAIN AGEAYg==", "VRFY a", "FOO"] {
        let lab = Lab::made(setup(&[legacy]), &[good]);
        let mut client = lab.connect();
        assert_eq!(client.reply(), "220 good ESMTP\r\n");
        assert_eq!(
            client.ask("EHLO c.example"),
            "250-good\r\n250-PIPELINING\r\n250-SIZE 1000\r\n250 STARTTLS\r\n"
        );
        client.expect("RSET", "250 ok");
        client.expect("BDAT 4 LAST\r\nxx", "503 ");
        client.expect("NOOP", "250 ok");
        assert_eq!(client.ask(command), "250 2.0.0 taken\r\n");
        client.expect("RSET", "250 reset");
        drop(client);
        let seen = [told(&lab), told(&lab)];
        assert!(
            seen.contains(&"EHLO c.example\r\nRSET\r\nNOOP\r\nFIN".to_owned()),
            "{seen:?}"
        );
        assert!(
            seen.contains(&format!("EHLO c.example\r\n{command}\r\nRSET\r\n")),
            "{seen:?}"
        );
    }
}

#[test]
fn clients_of_tls_stay_where_they_are() {
    let lab = Lab::made(setup(&[legacy]), &[good]);
    let mut client = lab.connect();
    client.reply();
    client.expect("EHLO c.example", "250");
    client.expect("STARTTLS", "220 ");
    let mut client = lab.secure(client);
    assert_eq!(
        client.ask("EHLO c.example"),
        "250-good\r\n250-PIPELINING\r\n250-AUTH PLAIN\r\n250 SIZE\r\n"
    );
    client.deliver("x\r\n.\r\n");
    client.expect("QUIT", "221 ");
    assert!(told(&lab).starts_with("EHLO c.example\r\nEHLO c.example\r\nMAIL"));
    assert_eq!(lab.end().end, End::Quit);
}

#[test]
fn clients_in_tls_from_the_first_byte_stay_too() {
    let setup = Setup {
        terms: Terms {
            detect_implicit_tls: Some(PATIENCE),
            ..Terms::default()
        },
        ..setup(&[legacy])
    };
    let lab = Lab::made(setup, &[good]);
    let mut client = lab.secure(lab.connect());
    assert_eq!(client.reply(), "220 good ESMTP\r\n");
    let ehlo = client.ask("EHLO c.example");
    assert!(ehlo.contains("AUTH PLAIN"), "{ehlo}");
    client.expect("MAIL FROM:<a@b>", "250 ok");
    client.expect("QUIT", "221 ");
    // The first to be asked anything: no member of the other pool was.
    assert_eq!(
        lab.seen(),
        "EHLO c.example\r\nMAIL FROM:<a@b>\r\nQUIT\r\nFIN"
    );
    assert_eq!(lab.end().end, End::Quit);
}

#[test]
fn pipelined_commands_go_to_one_member_alone() {
    let lab = Lab::made(setup(&[legacy]), &[good]);
    let mut client = lab.connect();
    client.reply();
    client.expect("EHLO c.example", "250");
    client.send("RSET\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n");
    assert_eq!(client.reply(), "250 ok\r\n");
    assert_eq!(client.reply(), "250 2.0.0 taken\r\n");
    assert_eq!(client.reply(), "250 2.0.0 taken\r\n");
    assert_eq!(client.reply(), "354 go\r\n");
    drop(client);
    let seen = [told(&lab), told(&lab)];
    let mail = "EHLO c.example\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n";
    assert!(seen.contains(&mail.to_owned()), "{seen:?}");
}

#[test]
fn tls_after_the_switch_goes_back() {
    let lab = Lab::made(setup(&[legacy]), &[good]);
    for command in ["MAIL FROM:<a@b>", "VRFY a"] {
        let mut client = lab.connect();
        client.reply();
        client.expect("EHLO c.example", "250");
        client.expect(command, "250 2.0.0 taken");
        client.expect("RSET", "250 reset");
        client.expect("EHLO c.example", "250");
        client.expect("STARTTLS", "220 ");
        let mut client = lab.secure(client);
        let ehlo = client.ask("EHLO c.example");
        assert!(ehlo.starts_with("250-good\r\n"), "{command}: {ehlo}");
    }
}

#[test]
fn without_a_member_in_plaintext_the_client_is_told() {
    let lab = Lab::made(setup(&[mute]), &[good]);
    let mut client = lab.connect();
    client.reply();
    assert_eq!(client.ask("EHLO c.example"), "250-good\r\n250 STARTTLS\r\n");
    client.send("MAIL FROM:<a@b>\r\n");
    let said = String::from_utf8(client.rest()).unwrap();
    assert!(said.starts_with("421 4.3.2 "), "{said}");
    assert_eq!(lab.end().end, End::NoMember);
}

#[test]
fn the_next_member_hears_what_one_would_not() {
    let lab = Lab::made(setup(&[mute, legacy]), &[good]);
    for _ in 0..2 {
        let mut client: Client<_> = lab.connect();
        client.reply();
        client.expect("EHLO c.example", "250");
        client.expect("MAIL FROM:<a@b>", "250 2.0.0 taken");
    }
}

#[test]
fn with_tls_towards_members_and_xclient() {
    let setup = Setup {
        server: |pair| {
            let roots = load_roots(Some(&pair.path("chain.pem"))).unwrap();
            let terms = ServerTerms {
                verify: Verify::Full { roots: None },
                name: None,
                certificate: None,
            };
            let tls = MemberTls::new(&terms, Some(&roots), None).unwrap();
            MemberSecurity::StartTls(Arc::new(tls))
        },
        xclient: true,
        ..setup(&[starttls])
    };
    let lab = Lab::made(setup, &[starttls]);
    let mut client = lab.connect();
    client.reply();
    let ehlo = client.ask("EHLO c.example");
    assert!(ehlo.contains("250-PIPELINING\r\n"), "{ehlo}");
    client.expect("MAIL FROM:<a@b>", "250 ok");
    drop(client);
    let own = "EHLO [127.0.0.1]\r\nSTARTTLS\r\n";
    let hello = "EHLO c.example\r\nXCLIENT ADDR=127.0.0.1 HELO=c.example\r\nEHLO c.example\r\n";
    let mut seen: Vec<_> = (0..3).map(|_| lab.seen()).collect();
    seen.sort_by_key(String::len);
    assert_eq!(seen[0], format!("{own}EHLO [127.0.0.1]\r\nQUIT\r\nFIN"));
    assert_eq!(seen[1], format!("{own}{hello}FIN"));
    assert_eq!(seen[2], format!("{own}{hello}MAIL FROM:<a@b>\r\nFIN"));
}
