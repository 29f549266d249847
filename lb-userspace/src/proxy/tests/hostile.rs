//! Clients and members that break the rules, over sockets.

use std::{
    io::Write,
    net::Shutdown,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use socket2::SockRef;

use super::{
    peers::{Kind, Lab, Setup, good, mortal, until},
    pressure::endless_lists,
};
use crate::{
    model::{LineEndings, StartTls, Terms},
    smtp::{end::End, timeouts::Timeouts},
};

const REQUIRE: Kind = Kind::StartTls(StartTls::Require);

#[test]
fn commands_behind_starttls_are_answered_and_closed() {
    let lab = Lab::new(REQUIRE, &[good]);
    let mut client = lab.connect();
    client.reply();
    client.ask("EHLO c");
    client.send("STARTTLS\r\nMAIL FROM:<evil@x>\r\nRCPT TO:<victim@x>\r\n");
    assert!(client.reply().starts_with("554 5.5.1 "));
    assert_eq!(client.rest(), b"");
    assert_eq!(lab.seen(), "EHLO c\r\nFIN");
    assert_eq!(lab.end().end, End::StartTlsInjection);
    assert_eq!(lab.events()["starttls-injection"], 1);
}

#[test]
fn plaintext_behind_220_is_closed() {
    for bytes in [
        &b"MAIL FROM:<evil@x>\r\n"[..],
        b"\r\n",
        b"\x16\x05\x01",
        b"GET / HTTP/1.1\r\n\r\n",
    ] {
        let lab = Lab::new(REQUIRE, &[good]);
        let mut client = lab.connect();
        client.reply();
        client.ask("EHLO c");
        client.expect("STARTTLS", "220 ");
        client.send(bytes);
        assert_eq!(client.rest(), b"");
        assert_eq!(lab.seen(), "EHLO c\r\nFIN");
        assert_eq!(lab.end().end, End::StartTlsInjection);
    }
}

#[test]
fn commands_in_a_later_segment_reach_nobody() {
    let lab = Lab::new(REQUIRE, &[good]);
    for _ in 0..20 {
        let mut client = lab.connect();
        client.reply();
        client.ask("EHLO c");
        client.send("STARTTLS\r\n");
        client.send("MAIL FROM:<evil@x>\r\n");
        let rest = String::from_utf8(client.rest()).unwrap();
        assert!(
            rest.starts_with("554 5.5.1 ") || rest.starts_with("220 "),
            "{rest:?}"
        );
        assert_eq!(rest.lines().count(), 1);
        assert_eq!(lab.seen(), "EHLO c\r\nFIN");
    }
    // The member hears of an end before it is counted.
    until("all of them to be counted", || {
        lab.events()["starttls-injection"] == 20
    });
}

#[test]
fn a_client_hello_in_any_pieces_is_fine() {
    let lab = Lab::new(REQUIRE, &[good]);
    let bytes = |hello: &[u8]| hello.iter().map(|byte| vec![*byte]).collect::<Vec<_>>();
    // RFC 8446 §5.1: a handshake message may span records.
    let records = |hello: &[u8], octets| {
        let record = |part: &[u8]| [&[22, 3, 1, 0, part.len() as u8], part].concat();
        hello[5..].chunks(octets).map(record).collect::<Vec<_>>()
    };
    for octets in [0, 1, 2, 5, 6] {
        let mut client = lab.connect();
        client.reply();
        client.ask("EHLO c");
        client.expect("STARTTLS", "220 ");
        let config = std::sync::Arc::new(lab.tls_config());
        let mut connection =
            rustls::ClientConnection::new(config, "mx.example".try_into().unwrap()).unwrap();
        let mut hello = Vec::new();
        connection.write_tls(&mut hello).unwrap();
        let pieces = match octets {
            0 => bytes(&hello),
            octets => records(&hello, octets),
        };
        for piece in pieces {
            client.send(piece);
        }
        let stream = rustls::StreamOwned::new(connection, client.stream);
        let mut client = super::peers::Client { stream };
        client.expect("EHLO c", "250-good");
    }
}

#[test]
fn junk_in_a_handshake_record_is_closed_at_once() {
    let lab = Lab::new(Kind::Implicit, &[good]);
    for junk in [
        &b"\x16\x03\x01\x00\x05junk!"[..],
        b"\x16\x03\x01\x00\x00\x16",
    ] {
        let mut client = lab.connect();
        client.send(junk);
        assert_eq!(client.rest(), b"");
    }
    assert!(lab.ends.wait(2).iter().all(|end| end.end == End::TlsFailed));
}

#[test]
fn clients_that_vanish_at_the_border_free_their_member() {
    let lab = Lab::new(REQUIRE, &[good]);
    for sent in [&b""[..], b"\x16", b"\x16\x03\x01\x02\x00\x01\x00"] {
        let mut client = lab.connect();
        client.reply();
        client.ask("EHLO c");
        client.expect("STARTTLS", "220 ");
        client.send(sent);
        drop(client);
        assert_eq!(lab.seen(), "EHLO c\r\nFIN");
    }
    until("members to be free", || {
        lab.pool.members()[0].counters().active() == 0
    });
    until("sessions to end", || lab.cell.active() == 0);
}

#[test]
fn a_client_hello_in_clear_is_closed_without_an_answer() {
    for kind in [Kind::Plain, REQUIRE] {
        let lab = Lab::new(kind, &[good]);
        let mut client = lab.connect();
        assert_eq!(client.reply(), "220 good ESMTP\r\n");
        client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03");
        assert_eq!(client.rest(), b"");
        assert_eq!(lab.end().end, End::ClientHelloInClear);
        assert_eq!(lab.seen(), "FIN");
    }
}

#[test]
fn plaintext_on_an_implicit_port_is_closed() {
    let lab = Lab::new(Kind::Implicit, &[good]);
    let mut client = lab.connect();
    client.send("EHLO c\r\n");
    assert_eq!(client.rest(), b"");
    assert_eq!(lab.end().end, End::TlsFailed);
}

#[test]
fn old_tls_is_told_so() {
    let lab = Lab::new(Kind::Implicit, &[good]);
    for minor in [0, 1, 2] {
        let mut client = lab.connect();
        let mut hello = vec![22, 3, 1, 0, 45, 1, 0, 0, 41, 3, minor];
        hello.extend_from_slice(&[7; 32]);
        hello.extend_from_slice(&[0, 0, 2, 0, 0x2f, 1, 0]);
        client.send(hello);
        assert_eq!(client.rest(), [21, 3, minor, 0, 2, 2, 70]);
    }
    assert!(lab.ends.wait(3).iter().all(|end| end.end == End::TlsFailed));
}

#[test]
fn protocols_other_than_smtp_are_refused() {
    let lab = Lab::new(Kind::Implicit, &[good]);
    for (offer, fine) in [
        (vec![], true),
        (vec!["smtp"], true),
        (vec!["h2", "http/1.1"], false),
    ] {
        let mut config = lab.tls_config();
        config.alpn_protocols = offer.into_iter().map(|name: &str| name.into()).collect();
        let mut client = lab.secure_with(lab.connect(), config);
        let error = client
            .stream
            .write_all(b"NOOP\r\n")
            .err()
            .map(|error| error.to_string());
        match fine {
            true => assert_eq!(client.reply(), "220 good ESMTP\r\n"),
            false => assert!(error.is_some_and(|error| error.contains("NoApplicationProtocol"))),
        }
    }
}

#[test]
fn resumed_sessions_start_afresh() {
    let lab = Lab::new(Kind::Implicit, &[good]);
    let config = lab.tls_config();
    for resumed in [false, true] {
        let mut client = lab.secure_with(lab.connect(), config.clone());
        client.reply();
        client.expect("NOOP", "250 ");
        let kind = client.stream.conn.handshake_kind().unwrap();
        assert_eq!(kind == rustls::HandshakeKind::Resumed, resumed);
        client.expect("QUIT", "221 ");
    }
}

#[test]
fn a_member_that_dies_within_a_message_is_no_250() {
    for kind in [Kind::Plain, Kind::Implicit] {
        let lab = Lab::new(kind, &[mortal]);
        let check = |replies: [String; 2]| {
            assert!(replies[0].starts_with("354 "), "{replies:?}");
            assert!(replies[1].starts_with("451 4.4.2 "), "{replies:?}");
        };
        if matches!(kind, Kind::Plain) {
            let mut client = lab.connect();
            client.reply();
            client.ask("EHLO c");
            client.expect("MAIL FROM:<a@b>", "250 ");
            let go = client.ask("DATA");
            client.send("line\r\nline\r\n");
            check([go, client.reply()]);
        } else {
            let mut client = lab.secure(lab.connect());
            client.reply();
            client.ask("EHLO c");
            client.expect("MAIL FROM:<a@b>", "250 ");
            let go = client.ask("DATA");
            client.send("line\r\nline\r\n");
            check([go, client.reply()]);
        }
        let end = lab.end();
        assert_eq!((end.messages, end.last_code), (0, 451));
    }
}

#[test]
fn a_lost_client_is_no_end_of_data() {
    let lab = Lab::new(Kind::Plain, &[good]);
    for reset in [false, true] {
        let mut client = lab.connect();
        client.reply();
        client.expect("MAIL FROM:<a@b>", "250 ");
        client.expect("DATA", "354 ");
        client.send("half\r\n.\r");
        if reset {
            SockRef::from(&client.stream)
                .set_linger(Some(Duration::ZERO))
                .unwrap();
            drop(client);
        } else {
            client.stream.shutdown(Shutdown::Write).unwrap();
            assert_eq!(client.rest(), b"");
        }
        assert!(lab.seen().ends_with("LOST"));
    }
    assert!(
        lab.ends
            .wait(2)
            .iter()
            .all(|end| end.end == End::ClientAborted)
    );
}

#[test]
fn smuggled_messages_are_refused_and_reach_nobody() {
    let lab = Lab::new(Kind::Plain, &[good]);
    let mut client = lab.connect();
    client.reply();
    client.expect("MAIL FROM:<a@b>", "250 ");
    client.expect("DATA", "354 ");
    client.send("one\r\n.\nMAIL FROM:<evil@x>\r\nDATA\r\ntwo\r\n.\r\n");
    assert!(client.reply().starts_with("554 "));
    assert_eq!(client.rest(), b"");
    let seen = lab.seen();
    assert!(seen.ends_with("LOST") && !seen.contains("evil"), "{seen:?}");
}

#[test]
fn endless_lines_and_junk_are_answered_and_closed() {
    let lab = Lab::new(Kind::Plain, &[good]);
    let mut client = lab.connect();
    client.reply();
    client.send(vec![b'a'; 1 << 20]);
    assert_eq!(client.rest(), b"500 5.5.2 Line too long\r\n");

    let mut client = lab.connect();
    client.reply();
    client.send(b"\x01\x02\xff\r\n".repeat(50_000));
    let rest = String::from_utf8(client.rest()).unwrap();
    assert!(rest.ends_with("421 4.7.0 Too many errors\r\n") && rest.lines().count() < 30);
}

#[test]
fn content_on_its_way_behind_a_refused_data_is_no_command() {
    static SENT: AtomicBool = AtomicBool::new(false);
    /// Refuses DATA when the content has been sent.
    fn slow(member: &mut super::peers::Member) {
        member.say("220 slow\r\n");
        let mut seen = Vec::new();
        while let Some(line) = member.line() {
            seen.extend_from_slice(&line);
            let reply = match &line[..4] {
                b"DATA" => {
                    until("content to be sent", || SENT.load(Relaxed));
                    "554 no\r\n"
                }
                _ => "250 ok\r\n",
            };
            member.say(reply);
        }
        let _ = member.log.send(seen);
    }
    let lab = Lab::new(Kind::Implicit, &[slow]);
    let mut client = lab.secure(lab.connect());
    client.reply();
    client.send("DATA\r\n");
    client.send("MAIL FROM:<evil@x>\r\n");
    client.send(".\r\nNOOP\r\n");
    SENT.store(true, Relaxed);
    assert_eq!(
        (client.reply(), client.reply()),
        ("554 no\r\n".into(), "250 ok\r\n".into())
    );
    drop(client);
    assert_eq!(lab.seen(), "DATA\r\nNOOP\r\n");
}

#[test]
fn silence_ends() {
    let timeouts = Timeouts {
        command: Duration::from_millis(100),
        handshake: Duration::from_millis(100),
        ..Timeouts::DEFAULT
    };
    let lab = Lab::with(Kind::Plain, &[good], timeouts);
    let mut client = lab.connect();
    client.reply();
    assert_eq!(client.reply(), "421 4.4.2 Timeout exceeded\r\n");
    assert_eq!(client.rest(), b"");

    let lab = Lab::with(Kind::Implicit, &[good], timeouts);
    assert_eq!(lab.connect().rest(), b"");
    assert_eq!(lab.end().end, End::TlsTimeout);
}

#[test]
fn a_client_that_does_not_read_costs_a_bounded_buffer_and_ends() {
    let setup = Setup {
        timeouts: Timeouts {
            send: Duration::from_millis(200),
            ..Timeouts::DEFAULT
        },
        sessions: endless_lists(),
        ..Setup::default()
    };
    fn endless(member: &mut super::peers::Member) {
        member.say("220 endless\r\n");
        let reply = format!("250 {}\r\n", "x".repeat(2000));
        while member.line().is_some() {
            member.say(&reply);
        }
    }
    let lab = Lab::made(setup, &[endless]);
    let client = lab.connect();
    let mut writer = client.stream.try_clone().unwrap();
    std::thread::spawn(move || {
        // RCPT TO is free of the budget for idle commands.
        while writer.write_all(b"RCPT TO:<a@b>\r\n").is_ok() {}
    });
    assert_eq!(lab.end().end, End::SendTimeout);
}

#[test]
fn who_is_heard_out_behind_an_alert_keeps_its_place() {
    for kind in [Kind::Implicit, Kind::StartTls(StartTls::Require)] {
        let terms = Terms {
            max_sessions: Some(1),
            ..Terms::default()
        };
        let lab = Lab::on(kind, &[good], &terms);
        let mut failing = lab.connect();
        if let Kind::StartTls(_) = kind {
            failing.reply();
            failing.expect("EHLO c", "250");
            failing.expect("STARTTLS", "220 ");
        }
        // TLS 1.0.
        failing.send(b"\x16\x03\x01\x00\x06\x01\x00\x00\x02\x03\x01");
        assert_eq!(lab.ends.wait(1)[0].end, End::TlsFailed);
        let mut refused = lab.connect();
        refused.rest();
        assert_eq!(lab.ends.wait(2)[1].end, End::TooManySessions);
        drop(failing);
        until("the place to be free", || {
            let count = lab.ends.wait(2).len();
            drop(lab.connect());
            let ends = lab.ends.wait(count + 1);
            ends[count].end != End::TooManySessions
        });
    }
}

#[test]
fn an_idle_session_is_small() {
    // The stream and the library's own state (rustls: 7.5 KiB) come on top.
    let (pump, future) = crate::proxy::session::sizes();
    assert!(pump <= 1024, "a pump takes {pump} bytes");
    assert!(future <= 1024, "a session's future takes {future} bytes");
}

#[test]
fn look_alikes_of_the_end_are_mended_on_the_way_to_the_member() {
    let terms = Terms {
        line_endings: LineEndings::Normalize,
        ..Terms::default()
    };
    // Longer than what is mended at once, and than what is read at once.
    let smuggled = "x\n.\nMAIL FROM:<evil@x>\r.\rDATA\r\n.\n";
    let lab = Lab::on(Kind::Implicit, &[good], &terms);
    let mut client = lab.secure(lab.connect());
    client.reply();
    client.deliver(&(smuggled.repeat(5000) + "\r\n.\r\n"));
    client.deliver("as it should be\r\n.\r\n");
    client.expect("QUIT", "221 ");
    let mended = "x\r\n..\r\nMAIL FROM:<evil@x> . DATA\r\n..\r\n".repeat(5000);
    let before = "MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n";
    let seen = format!("{before}{mended}\r\n.\r\n{before}as it should be\r\n.\r\nQUIT\r\nFIN");
    assert!(lab.seen() == seen, "the member saw something else");
    let end = lab.end();
    assert_eq!((end.messages, end.normalized), (2, 1));
    until("the message to be counted", || {
        lab.events()["message-normalized"] == 1
    });
}
