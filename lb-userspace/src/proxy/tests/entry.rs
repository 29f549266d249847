//! Before the dialogue: headers of a balancer in front, limits, early talkers, TLS where STARTTLS was awaited.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr},
    time::{Duration, Instant},
};

use super::peers::{Kind, Lab, Member, PATIENCE, good, until};
use crate::{
    model::{
        Policy, ProxyHeader, Rule, Sessions, StartTls, Terms,
        policy::{Action, Range},
        session::{Pregreet, PregreetAction, SessionTimeouts},
    },
    proxy::{
        Control,
        header::{self, Progress},
    },
    smtp::{end::End, phase::Phase},
    tls::tests::Pair,
};

const ALLOW: Kind = Kind::StartTls(StartTls::Allow);

/// Terms that take a header from this test.
pub(super) fn trusting() -> Terms {
    Terms {
        accept_proxy_from: vec![Range::prefix("127.0.0.0".parse().unwrap(), 8)],
        ..Terms::default()
    }
}

pub(super) fn v2_header(source: &str) -> Vec<u8> {
    let source: SocketAddr = source.parse().unwrap();
    let destination = match source.is_ipv4() {
        true => "203.0.113.10:25",
        false => "[2001:db8::25]:25",
    };
    header::v2(&header::Client {
        source,
        destination: destination.parse().unwrap(),
        unique_id: "front",
        secured: None,
    })
}

#[test]
fn a_trusted_header_says_who_the_client_is() {
    let lab = Lab::on(Kind::Plain, &[good], &trusting());
    let lines = [
        b"PROXY TCP4 192.0.2.1 203.0.113.10 4711 25\r\n".to_vec(),
        v2_header("192.0.2.1:4711"),
    ];
    for (count, header) in (1..).zip(lines) {
        let mut client = lab.connect();
        // Byte by byte, and the first command right behind it.
        for byte in &header {
            client.send([*byte]);
        }
        assert_eq!(client.reply(), "220 good ESMTP\r\n");
        let sessions = lab.proxy.as_ref().unwrap().sessions();
        assert_eq!(sessions[0].client, "192.0.2.1:4711".parse().unwrap());
        client.expect("QUIT", "221 ");
        assert_eq!(
            lab.seen(),
            "QUIT\r\nFIN",
            "no byte of it reaches the member"
        );
        let end = lab.ends.wait(count).pop().unwrap();
        assert_eq!(end.client, "192.0.2.1:4711".parse().unwrap());
        assert_eq!(end.local, "203.0.113.10:25".parse().unwrap());
    }
    // Both at once, with an EHLO that is patient no longer.
    let mut client = lab.connect();
    let mut bytes = v2_header("[2001:db8::1]:4711");
    bytes.extend_from_slice(b"EHLO c\r\n");
    client.send(bytes);
    client.reply();
    assert!(client.reply().contains("PIPELINING"));
}

#[test]
fn a_header_that_speaks_for_itself_keeps_the_address() {
    let lab = Lab::on(Kind::Plain, &[good], &trusting());
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0".as_slice();
    for (count, header) in (1..).zip([b"PROXY UNKNOWN\r\n".as_slice(), local]) {
        let mut client = lab.connect();
        let own = client.stream.local_addr().unwrap();
        client.send(header);
        client.reply();
        client.expect("QUIT", "221 ");
        assert_eq!(lab.ends.wait(count).pop().unwrap().client, own);
    }
}

#[test]
fn a_malformed_header_closes_without_a_word() {
    let lab = Lab::on(Kind::Plain, &[good], &trusting());
    let broken = {
        let mut header = v2_header("192.0.2.1:4711");
        *header.last_mut().unwrap() ^= 1;
        header
    };
    let bad = [
        b"EHLO c\r\n".to_vec(),
        b"PROXY TCP4 x\r\n".to_vec(),
        broken,
        vec![0x16, 3, 1],
    ];
    for (count, header) in (1..).zip(bad) {
        let mut client = lab.connect();
        client.send(header);
        assert_eq!(client.rest(), b"");
        let end = lab.ends.wait(count).pop().unwrap();
        assert_eq!(
            (end.end, end.phase),
            (End::BadProxyHeader, Phase::ProxyHeader)
        );
        assert_eq!(end.member, None, "no member was bothered");
    }
}

#[test]
fn a_header_that_does_not_come_is_not_waited_for() {
    let sessions = Sessions {
        timeouts: SessionTimeouts {
            proxy_header: Duration::from_millis(50),
            ..SessionTimeouts::DEFAULT
        },
        ..Sessions::default()
    };
    let pair = Pair::new(&["mx.example"]);
    let lab = Lab::all(Kind::Plain, &[good], pair, &trusting(), sessions);
    let mut client = lab.connect();
    client.send("PROXY TCP4 ");
    assert_eq!(client.rest(), b"");
    assert_eq!(lab.end().end, End::BadProxyHeader);
}

#[test]
fn a_header_of_a_stranger_is_a_syntax_error() {
    let elsewhere = Terms {
        accept_proxy_from: vec![Range::prefix("192.0.2.0".parse().unwrap(), 24)],
        ..Terms::default()
    };
    for terms in [Terms::default(), elsewhere] {
        let lab = Lab::on(Kind::Plain, &[good], &terms);
        let mut client = lab.connect();
        client.reply();
        client.expect("PROXY TCP4 192.0.2.1 203.0.113.10 4711 25", "500 5.5.2 ");
        let own = client.stream.local_addr().unwrap();
        client.expect("QUIT", "221 ");
        assert_eq!(lab.end().client, own);
        assert_eq!(lab.seen(), "QUIT\r\nFIN");
    }
}

#[test]
fn policies_judge_the_client_of_a_header() {
    let rule = |name: &str, prefix: &str, action| Rule {
        name: name.into(),
        enabled: true,
        source: vec![Range::prefix(prefix.parse().unwrap(), 24)].into(),
        source_file: None,
        vlans: Vec::new(),
        interfaces: Vec::new(),
        schedule: None,
        action,
        log: false,
    };
    let policy = Policy {
        name: "edge".into(),
        default: Action::Accept,
        log: false,
        rules: vec![
            rule("drop", "192.0.2.0", Action::Drop),
            rule("reject", "198.51.100.0", Action::RejectIcmp),
        ],
    };
    let lab = Lab::guarded(Kind::Plain, &[good], &trusting(), policy);
    for (count, source, answer) in [
        (1, "192.0.2.1", ""),
        (2, "198.51.100.1", "554 5.7.1 Access denied\r\n"),
    ] {
        let mut client = lab.connect();
        client.send(v2_header(&format!("{source}:4711")));
        assert_eq!(client.rest(), answer.as_bytes());
        assert_eq!(lab.ends.wait(count).pop().unwrap().end, End::Denied);
    }
    let mut client = lab.connect();
    client.send(v2_header("203.0.113.1:4711"));
    client.reply();
    client.expect("QUIT", "221 ");
}

/// A member that reads a header first, and says in its greeting what it was told.
fn told(member: &mut Member) {
    let mut header = Vec::new();
    let told = loop {
        let mut byte = [0];
        if member.tcp().read(&mut byte).unwrap_or(0) == 0 {
            return;
        }
        header.push(byte[0]);
        match header::parse(&header) {
            Ok(Progress::More) => {}
            Ok(Progress::Done { told, .. }) => break told,
            Err(_) => return member.die(),
        }
    };
    let _ = member.log.send(header);
    let (source, destination) = told.unwrap();
    member.say(&format!("220 {source} {destination}\r\n"));
    while let Some(line) = member.line() {
        member.say(if line.starts_with(b"EHLO") {
            "250 told\r\n"
        } else {
            "250 ok\r\n"
        });
    }
}

#[test]
fn members_are_told_who_the_client_is() {
    for version in [ProxyHeader::V1, ProxyHeader::V2] {
        let terms = Terms {
            proxy_protocol: version,
            ..Terms::default()
        };
        let lab = Lab::on(Kind::Plain, &[told], &terms);
        let mut client = lab.connect();
        let ends = (client.stream.local_addr().unwrap(), lab.address);
        assert_eq!(client.reply(), format!("220 {} {}\r\n", ends.0, ends.1));
        let header = lab.seen.recv_timeout(PATIENCE).unwrap();
        assert_eq!(
            header.starts_with(b"PROXY TCP4 "),
            version == ProxyHeader::V1
        );
        let end = (drop(client), lab.end()).1;
        let id = end.id.to_string();
        let has_id = header
            .windows(id.len())
            .any(|window| window == id.as_bytes());
        assert_eq!(
            has_id,
            version == ProxyHeader::V2,
            "the unique id is the log's"
        );
    }
}

#[test]
fn a_header_passes_on_what_it_was_told() {
    let terms = Terms {
        proxy_protocol: ProxyHeader::V2,
        ..trusting()
    };
    let lab = Lab::on(Kind::Plain, &[told], &terms);
    for (source, destination) in [
        ("192.0.2.7:4711", "203.0.113.10:25"),
        ("[2001:db8::7]:4711", "[2001:db8::25]:25"),
    ] {
        let mut client = lab.connect();
        client.send(v2_header(source));
        assert_eq!(client.reply(), format!("220 {source} {destination}\r\n"));
    }
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn the_second_version_tells_of_tls_that_is_there_by_then() {
    let terms = Terms {
        proxy_protocol: ProxyHeader::V2,
        ..Terms::default()
    };
    let lab = Lab::on(Kind::Implicit, &[told], &terms);
    let mut client = lab.secure(lab.connect());
    client.reply();
    let header = lab.seen.recv_timeout(PATIENCE).unwrap();
    for part in [
        b"mx.example".as_slice(),
        b"TLSv1.3",
        b"TLS13_AES_",
        b"\x20\0",
    ] {
        assert!(holds(&header, part), "{header:?} lacks {part:?}");
    }
    // With STARTTLS the member is connected before: it speaks first.
    let lab = Lab::on(ALLOW, &[told], &terms);
    let mut client = lab.connect();
    client.reply();
    client.ask("EHLO c");
    client.expect("MAIL FROM:<a@b>", "250 ");
    assert!(!holds(&lab.seen.recv_timeout(PATIENCE).unwrap(), b"TLSv1"));
    client.expect("STARTTLS", "220 ");
    let mut client = lab.secure(client);
    client.expect("EHLO c", "250");
    // What it was told in clear made another connection necessary, and that one knows.
    assert!(holds(&lab.seen.recv_timeout(PATIENCE).unwrap(), b"TLSv1.3"));
}

#[test]
fn sessions_are_limited_by_virtual_server_and_by_source() {
    let limits = |all, source| Terms {
        max_sessions: all,
        max_sessions_per_source: source,
        ..Terms::default()
    };
    for (terms, answer, end) in [
        (
            limits(Some(2), None),
            "421 4.3.2 Too many connections\r\n",
            End::TooManySessions,
        ),
        (
            limits(None, Some(2)),
            "421 4.7.0 Too many connections from your network\r\n",
            End::TooManyOfSource,
        ),
    ] {
        let lab = Lab::on(Kind::Plain, &[good], &terms);
        let mut held: Vec<_> = (0..2).map(|_| lab.connect()).collect();
        held.iter_mut().for_each(|client| _ = client.reply());
        let mut refused = lab.connect();
        refused.send("EHLO in a hurry\r\n");
        assert_eq!(refused.rest(), answer.as_bytes());
        let found = lab.ends.wait(1).pop().unwrap();
        assert_eq!((found.end, found.last_code, found.member), (end, 421, None));
        assert_eq!(lab.events()[end.as_str()], 1);
        drop(held.pop());
        until("a place to be free", || {
            let mut client = lab.connect();
            client.reply().starts_with("220 ")
        });
    }
}

#[test]
fn all_sessions_together_are_limited() {
    let sessions = Sessions {
        max: 1,
        ..Sessions::default()
    };
    let pair = Pair::new(&["mx.example"]);
    let lab = Lab::all(Kind::Implicit, &[good], pair, &Terms::default(), sessions);
    let mut first = lab.secure(lab.connect());
    first.reply();
    // Words in clear would be no TLS.
    assert_eq!(lab.connect().rest(), b"");
    assert_eq!(lab.end().end, End::TooManySessions);
}

#[test]
fn a_client_hello_in_place_of_silence_is_taken() {
    let terms = Terms {
        detect_implicit_tls: Some(Duration::from_secs(10)),
        ..Terms::default()
    };
    let lab = Lab::on(Kind::StartTls(StartTls::Require), &[good], &terms);
    let mut client = lab.secure(lab.connect());
    assert_eq!(client.reply(), "220 good ESMTP\r\n");
    let capabilities = client.ask("EHLO c");
    assert!(!capabilities.contains("STARTTLS"), "{capabilities}");
    client.expect("STARTTLS", "503 ");
    client.deliver("in TLS from the first byte\r\n.\r\n");
    client.expect("QUIT", "221 ");
    let end = lab.end();
    assert!(end.tls.is_some() && !end.starttls_used && !end.starttls_offered);
    // A client in a hurry does not wait for the rest of the time.
    let begun = Instant::now();
    let mut client = lab.connect();
    client.send("EHLO c\r\n");
    client.reply();
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_silent_client_waits_no_longer_than_it_must() {
    let wait = Duration::from_millis(150);
    let terms = Terms {
        detect_implicit_tls: Some(wait),
        ..Terms::default()
    };
    let lab = Lab::on(ALLOW, &[good], &terms);
    let begun = Instant::now();
    let mut client = lab.connect();
    client.reply();
    assert!(begun.elapsed() >= wait);
    client.ask("EHLO c");
    client.expect("STARTTLS", "220 ");
    let mut client = lab.secure(client);
    client.expect("EHLO c", "250");
    drop(client);
    let end = lab.end();
    assert!(end.starttls_used && end.wait >= wait, "{:?}", end.wait);
}

/// A member that keeps its own greeting back.
fn slow(member: &mut Member) {
    let keep = Duration::from_millis(300);
    member.tcp().set_read_timeout(Some(keep)).unwrap();
    // Nobody talks to it meanwhile.
    assert!(member.tcp().read(&mut [0]).is_err());
    member.tcp().set_read_timeout(Some(PATIENCE)).unwrap();
    good(member);
}

fn pregreet(wait: u64, action: PregreetAction) -> Terms {
    Terms {
        pregreet: Some(Pregreet {
            wait: Duration::from_millis(wait),
            action,
        }),
        ..Terms::default()
    }
}

#[test]
fn early_talkers_get_what_the_configuration_says() {
    let delay = Duration::from_millis(200);
    // While the greeting is kept back here, and while the member keeps its own back.
    for (wait, member) in [(5_000, good as fn(&mut Member)), (10, slow)] {
        for action in [
            PregreetAction::Log,
            PregreetAction::Delay(delay),
            PregreetAction::Reject,
        ] {
            let lab = Lab::on(Kind::Plain, &[member], &pregreet(wait, action));
            let mut client = lab.connect();
            if wait < 1000 {
                // Behind our own wait, before the member's greeting.
                until("the wait to be over", || {
                    let sessions = lab.proxy.as_ref().unwrap().sessions();
                    sessions.first().is_some_and(|it| it.phase == "greeting")
                });
            }
            let begun = Instant::now();
            client.send("EHLO spammer\r\n");
            let first = client.reply();
            if action == PregreetAction::Reject {
                assert_eq!(
                    first,
                    "554 5.5.1 Protocol error: talked before the greeting\r\n"
                );
                assert_eq!(client.rest(), b"");
                assert_eq!(lab.end().end, End::Pregreet);
            } else {
                assert_eq!(first, "220 good ESMTP\r\n");
                assert!(client.reply().starts_with("250-"), "replies do not shift");
                client.expect("QUIT", "221 ");
            }
            if action == PregreetAction::Delay(delay) {
                assert!(begun.elapsed() >= delay);
            }
            assert!(lab.end().early);
            assert_eq!(lab.events()["early-talker"], 1);
        }
    }
}

#[test]
fn who_is_kept_waiting_hears_that_the_member_goes() {
    let delay = PregreetAction::Delay(Duration::from_secs(60));
    let lab = Lab::on(Kind::Plain, &[slow], &pregreet(10, delay));
    let proxy = lab.proxy.as_ref().unwrap();
    let mut client = lab.connect();
    until("the wait to be over", || {
        let sessions = proxy.sessions();
        sessions.first().is_some_and(|it| it.phase == "greeting")
    });
    client.send("EHLO spammer\r\n");
    until("it to be noticed", || lab.events()["early-talker"] == 1);
    proxy.end_member(0, Control::Drain);
    assert!(
        String::from_utf8(client.rest())
            .unwrap()
            .contains("421 4.3.2 ")
    );
    assert_eq!(lab.end().end, End::Drained);
}

#[test]
fn patient_clients_are_no_early_talkers() {
    let lab = Lab::on(Kind::Plain, &[slow], &pregreet(50, PregreetAction::Reject));
    let mut client = lab.connect();
    assert_eq!(client.reply(), "220 good ESMTP\r\n");
    client.ask("EHLO c");
    client.expect("QUIT", "221 ");
    assert!(!lab.end().early);
    assert_eq!(lab.events()["early-talker"], 0);
}

#[test]
fn who_is_gone_before_the_greeting_bothers_no_member() {
    let lab = Lab::on(Kind::Plain, &[good], &pregreet(10_000, PregreetAction::Log));
    let client = lab.connect();
    client.stream.shutdown(Shutdown::Both).unwrap();
    let end = lab.end();
    assert_eq!((end.end, end.phase), (End::ClientClosed, Phase::Pregreet));
    assert_eq!(end.member, None);
}

#[test]
fn a_stop_does_not_wait_for_those_on_their_way_in() {
    let patient = pregreet(50_000, PregreetAction::Log);
    for terms in [patient, trusting()] {
        let mut lab = Lab::on(Kind::Plain, &[good], &terms);
        let mut client = lab.connect();
        until("the session to begin", || {
            !lab.proxy.as_ref().unwrap().sessions().is_empty()
        });
        let report = lab.proxy.take().unwrap().drain(PATIENCE);
        assert_eq!((report.finished, report.cut), (1, 0));
        assert_eq!(client.rest(), b"421 4.3.2 Service is shutting down\r\n");
    }
}

#[test]
fn a_client_that_resets_within_a_header_frees_everything() {
    let lab = Lab::on(Kind::Plain, &[good], &trusting());
    let mut client = lab.connect();
    client.stream.write_all(b"PROXY ").unwrap();
    // Who resets before accept was never there.
    until("the session to begin", || {
        !lab.proxy.as_ref().unwrap().sessions().is_empty()
    });
    socket2::SockRef::from(&client.stream)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop(client);
    assert_eq!(lab.end().end, End::BadProxyHeader);
    until("the session to go", || lab.cell.active() == 0);
}
