//! What dishonest, broken and dying peers do.

use super::*;
use crate::smtp::line::MAX_COMMAND;

fn in_data(security: ClientSecurity) -> Lab {
    let mut lab = Lab::greeted(security);
    lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
    lab.exchange("RCPT TO:<c@d>\r\n", "250 ok\r\n");
    lab.exchange("DATA\r\n", "354 go\r\n");
    lab
}

#[test]
fn smuggled_ends_of_data_are_refused_and_no_member_accepts_them() {
    for look_alike in [
        "\n.\n",
        "\n.\r\n",
        "\r\n.\n",
        "\r.\r",
        "\r\n.\r",
        "\r.\r\n",
        "\r\n\0.\r\n",
        "\r\n.\0\r\n",
    ] {
        let mut lab = in_data(ClientSecurity::None);
        lab.sends(format!(
            "one{look_alike}MAIL FROM:<evil@x>\r\nRCPT TO:<v@x>\r\nDATA\r\n"
        ));
        lab.sends("two\r\n.\r\nQUIT\r\n");
        assert!(lab.aborted, "{look_alike:?}");
        assert!(!lab.reached().contains("evil"), "{look_alike:?}");
        assert!(lab.heard().starts_with("554 5.6.0 "), "{look_alike:?}");
        assert_eq!(
            (lab.end, lab.session.facts().messages),
            (Some(End::BareControl), 0)
        );
        assert_eq!(lab.session.facts().ended_in, Some(Phase::Data));
    }
}

/// Found by `smtp_client`: what is answered is older than the chunk behind it.
#[test]
fn a_chunk_behind_what_ends_another_message_is_broken_off() {
    for before in ["RSET\r\n", "BDAT 0 LAST\r\n"] {
        let mut lab = Lab::greeted(ClientSecurity::None);
        lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
        lab.sends(format!("{before}BDAT 3\r\nabc"));
        lab.says("250 ok\r\n250 ok\r\n");
        lab.session.client_closed(lab.now);
        lab.offer();
        assert_eq!(lab.end, Some(End::ClientClosed));
        assert!(lab.aborted, "{before:?}");
    }
}

/// Found by `smtp_client`: the shell saw content on its way, and what follows its end is none.
#[test]
fn a_line_like_a_field_behind_refused_content_is_a_bad_command() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.sends("DATA\r\n");
    lab.says("503 no\r\n");
    assert!(lab.session.is_data_refused());
    lab.session.content_follows();
    lab.sends("Subject: x\r\n\r\n.\r\nX: y\r\nNOOP\r\n");
    assert_eq!(lab.reached(), "DATA\r\nNOOP\r\n");
    lab.says("250 ok\r\n");
    assert_eq!(
        lab.heard(),
        "503 no\r\n500 5.5.2 Command not recognized\r\n250 ok\r\n"
    );
}

#[test]
fn nobody_logs_in_by_the_certificate_of_the_proxy() {
    let mut lab = Lab::greeted(ClientSecurity::Implicit);
    for command in [
        "AUTH EXTERNAL =",
        "auth external",
        "AUTH  SCRAM-SHA-256-PLUS bixzPQ==",
        "X-EXPS EXTERNAL",
    ] {
        lab.refused(&format!("{command}\r\n"), "504 5.5.4 ");
    }
    lab.exchange("AUTH SCRAM-SHA-256 bixzPQ==\r\n", "334 x\r\n");
    // A response, whatever it looks like.
    lab.exchange("AUTH EXTERNAL\r\n", "535 no\r\n");
}

#[test]
fn who_says_helo_gets_no_list() {
    let mut lab = Lab::new(REQUIRE);
    lab.sends("HELO c\r\n");
    assert_eq!(lab.reached(), "HELO c\r\n");
    lab.says("250-mx1 at your service\r\n250-AUTH PLAIN\r\n250 STARTTLS\r\n");
    assert_eq!(lab.heard(), "250 mx1 at your service\r\n");
    lab.exchange("HELO c\r\n", "550-go\r\n550 away\r\n");
    for command in [
        "XEXCH50 8 2",
        "X-LINK2STATE LAST CHUNK={x}",
        "VERB ON",
        "BURL imap://x/y LAST",
    ] {
        lab.refused(&format!("{command}\r\n"), "502 ");
    }
}

#[test]
fn content_behind_a_refused_data_is_no_command() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.sends("MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nMAIL FROM:<evil@x>\r\n\n.\nQUIT\r\n.\r\nNOOP\r\n");
    assert_eq!(
        lab.reached(),
        "MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n"
    );
    lab.says("250 ok\r\n550 no\r\n554 no recipients\r\n");
    assert_eq!(lab.heard(), "250 ok\r\n550 no\r\n554 no recipients\r\n");
    assert_eq!(lab.reached(), "NOOP\r\n");

    // Refused here.
    let mut lab = Lab::greeted(REQUIRE);
    lab.refused("DATA\r\nEHLO evil\r\n.\r\n", "530 5.7.0 ");
    lab.exchange("NOOP\r\n", "250 ok\r\n");

    // On its way, but not read yet: the shell has looked.
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.exchange("DATA\r\n", "554 no\r\n");
    assert!(lab.session.is_data_refused() && !lab.session.is_data_refused());
    lab.session.content_follows();
    lab.sends("MAIL FROM:<evil@x>\r\n.\r\n");
    assert_eq!(lab.reached(), "");
    lab.exchange("NOOP\r\n", "250 ok\r\n");

    // Later, but no client that waited begins with a header field.
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.exchange("DATA\r\n", "554 no\r\n");
    lab.sends("Received: from evil\r\nMAIL FROM:<evil@x>\r\n");
    lab.sends("RCPT TO:<victim@x>\r\n.\r\n");
    assert_eq!((lab.heard().as_str(), lab.reached().as_str()), ("", ""));
    lab.exchange("NOOP\r\n", "250 ok\r\n");
    lab.refused("Subject: x\r\n", "500 ");

    // And a client that waited goes on at once.
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.exchange("DATA\r\n", "503 no mail\r\n");
    lab.exchange("NOOP\r\n", "250 ok\r\n");
}

#[test]
fn chunks_behind_a_refused_bdat_are_no_commands() {
    let mut lab = Lab::new(ClientSecurity::None);
    lab.sends("EHLO c\r\n");
    lab.says("250 mx1\r\n");
    lab.heard();
    lab.reached();
    lab.refused("BDAT 14 LAST\r\nMAIL FROM:<x>", "503 5.5.1 ");
    lab.sends("\nNOOP\r\n");
    assert_eq!(lab.reached(), "NOOP\r\n");
    lab.says("250 ok\r\n");
    lab.heard();
    lab.refused("BDAT x\r\nMAIL FROM:<x>\r\n", "503 5.5.1 ");
    assert_eq!(lab.end, Some(End::ClientProtocol));
}

#[test]
fn a_lost_client_is_never_an_end_of_data() {
    let mut lab = in_data(ClientSecurity::None);
    lab.sends("half a message\r\n.");
    lab.session.client_closed(lab.now);
    lab.offer();
    assert_eq!((lab.end, lab.aborted), (Some(End::ClientAborted), true));

    for (chunk, end) in [
        ("BDAT 10 LAST\r\nhalf", End::ClientAborted),
        ("BDAT 4\r\nhalf", End::ClientClosed),
    ] {
        let mut lab = Lab::greeted(ClientSecurity::None);
        lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
        lab.sends(chunk);
        if end == End::ClientClosed {
            lab.says("250 got it\r\n");
        }
        lab.session.client_closed(lab.now);
        lab.offer();
        assert_eq!((lab.end, lab.aborted), (Some(end), true));
    }

    let mut lab = in_data(ClientSecurity::None);
    lab.session.client_broken();
    lab.offer();
    assert_eq!((lab.end, lab.aborted), (Some(End::ClientAborted), true));
}

#[test]
fn a_message_that_is_not_answered_is_broken_off() {
    let open: [fn() -> Lab; 4] = [
        || {
            let mut lab = in_data(ClientSecurity::None);
            lab.sends("all\r\n.\r\n");
            lab
        },
        || {
            let mut lab = Lab::greeted(ClientSecurity::None);
            lab.sends("DATA\r\n");
            lab
        },
        || {
            let mut lab = Lab::greeted(ClientSecurity::None);
            lab.sends("BDAT 3\r\nabc");
            lab.says("250 ok\r\n");
            lab
        },
        || in_data(ClientSecurity::None),
    ];
    for made in open {
        let mut lab = made();
        lab.session.cut();
        lab.offer();
        assert_eq!((lab.end, lab.aborted), (Some(End::Cut), true));
        let mut lab = made();
        lab.session.client_broken();
        lab.offer();
        assert_eq!((lab.end, lab.aborted), (Some(End::ClientAborted), true));
    }
    // It answers before it has all, and the rest is dropped.
    let mut lab = in_data(ClientSecurity::None);
    lab.sends("all\r\n.\r\n");
    lab.session.to_member().extend_from_slice(b"all\r\n.\r\n");
    lab.session.handle_member(b"250 ok\r\n", lab.now);
    lab.session.cut();
    lab.offer();
    assert_eq!((lab.end, lab.aborted), (Some(End::Drained), true));
    // Between messages it is an orderly end.
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
    lab.session.cut();
    lab.offer();
    assert_eq!((lab.end, lab.aborted), (Some(End::Drained), false));
}

#[test]
fn a_lost_member_is_never_a_250() {
    let mut lab = in_data(ClientSecurity::None);
    lab.sends("half");
    lab.session.member_closed(lab.now);
    lab.offer();
    assert!(lab.heard().starts_with("451 4.4.2 "));
    assert_eq!(lab.end, Some(End::MemberClosed));

    let mut lab = in_data(ClientSecurity::None);
    lab.sends("all\r\n.\r\n");
    lab.session.member_closed(lab.now);
    lab.offer();
    assert!(lab.heard().starts_with("451 4.4.2 "));

    // Of chunks: within one, before its answer, between two, before the answer to all.
    for (chunks, answers) in [
        ("BDAT 9\r\nhalf", ""),
        ("BDAT 4\r\nhalf", ""),
        ("BDAT 4\r\nhalf", "250 ok\r\n"),
        ("BDAT 4\r\nhalf", "250 ok\r\n250 ok\r\n"),
        ("BDAT 4\r\nhalfBDAT 0 LAST\r\n", "250 ok\r\n250 ok\r\n"),
    ] {
        let mut lab = Lab::greeted(ClientSecurity::None);
        lab.sends(format!("MAIL FROM:<a@b>\r\n{chunks}"));
        lab.says(answers);
        assert_eq!(lab.heard(), answers);
        lab.session.member_closed(lab.now);
        lab.offer();
        assert!(lab.heard().starts_with("451 4.4.2 "), "{chunks:?}");
        assert_eq!((lab.end, lab.aborted), (Some(End::MemberClosed), true));
    }

    // None has begun, or all is answered.
    for (commands, answers) in [
        ("", ""),
        ("MAIL FROM:<a@b>\r\nDATA\r\n", "250 ok\r\n"),
        (
            "MAIL FROM:<a@b>\r\nBDAT 4 LAST\r\nfull",
            "250 ok\r\n250 taken\r\n",
        ),
    ] {
        let mut lab = Lab::greeted(ClientSecurity::None);
        lab.sends(commands);
        lab.says(answers);
        assert_eq!(lab.heard(), answers);
        lab.session.member_closed(lab.now);
        lab.offer();
        assert!(lab.heard().starts_with("421 4.4.2 "), "{commands:?}");
    }

    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.sends("QUIT\r\n");
    lab.session.member_closed(lab.now);
    lab.offer();
    assert!(lab.heard().starts_with("221 2.0.0 "));
    assert_eq!(lab.end, Some(End::Quit));
}

#[test]
fn unasked_replies_never_shift_the_others() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.says("250 unasked\r\n");
    assert!(lab.heard().starts_with("421 4.4.2 "));
    assert_eq!((lab.end, lab.aborted), (Some(End::MemberProtocol), true));

    let mut lab = in_data(ClientSecurity::None);
    lab.sends("half");
    lab.says("250 accepted already\r\n");
    assert!(lab.heard().starts_with("451 4.4.2 "));
    assert_eq!(lab.session.facts().messages, 0);

    // Neither a go-ahead nor a refusal.
    for reply in ["250 ok", "220 ok", "300 go", "355 go"] {
        let mut lab = Lab::greeted(ClientSecurity::None);
        lab.sends("DATA\r\n");
        lab.says(format!("{reply}\r\n"));
        assert!(lab.heard().starts_with("421 4.4.2 "), "{reply}");
        assert_eq!(lab.end, Some(End::MemberProtocol));
    }

    // 354 and 334 where nobody asked for them.
    for (command, reply) in [
        ("NOOP", "354 go"),
        ("MAIL FROM:<a@b>", "334 x"),
        ("DATAX", "354 go"),
        ("NOOP", "oops"),
    ] {
        let mut lab = Lab::greeted(ClientSecurity::None);
        lab.sends(format!("{command}\r\n"));
        lab.says(format!("{reply}\r\n"));
        assert!(lab.heard().starts_with("421 4.4.2 "), "{command} {reply}");
    }

    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.sends("MAIL FROM:<a@b>\r\nBDAT 10 LAST\r\nhalf");
    lab.says("250 ok\r\n250 accepted already\r\n");
    assert!(lab.heard().starts_with("250 ok\r\n451 4.4.2 "));
}

#[test]
fn a_member_that_says_421_is_quoted() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.sends("MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n");
    lab.says("421 4.7.0 too much\r\n");
    assert_eq!(lab.heard(), "421 4.7.0 too much\r\n");
    assert_eq!(lab.end, Some(End::MemberUnavailable));
}

#[test]
fn malformed_lines_get_500_and_reach_nobody() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    for line in [
        "NOOP\nRSET\r\n",
        "NOOP\rRSET\r\n",
        "NO\0OP\r\n",
        "\r\n",
        " NOOP\r\n",
        "Subject: x\r\n",
    ] {
        lab.refused(line, "500 5.5.2 ");
    }
    for verb in ["XCLIENT NAME=x", "xforward ADDR=1.2.3.4", "TURN", "ATRN x"] {
        lab.refused(&format!("{verb}\r\n"), "5");
    }
    lab.refused("MAIL FROM:<a@b> REQUIRETLS\r\n", "530 5.7.30 ");
    lab.exchange("NOOP\r\n", "250 ok\r\n");
}

#[test]
fn local_replies_to_helo_clients_carry_no_enhanced_codes() {
    let mut lab = Lab::new(REQUIRE);
    lab.refused("MAIL FROM:<a@b>\r\n", "530 5.7.0 ");
    lab.exchange("HELO c\r\n", "250 mx1\r\n");
    lab.refused("MAIL FROM:<a@b>\r\n", "530 Must issue");
}

#[test]
fn http_is_closed_at_once_and_not_echoed() {
    for security in [ClientSecurity::None, ClientSecurity::Implicit, REQUIRE] {
        let mut lab = Lab::new(security);
        lab.sends("POST /secret HTTP/1.1\r\nHost: x\r\n\r\nMAIL FROM:<evil@x>\r\n");
        assert_eq!(lab.heard(), "500 5.5.2 Command not recognized\r\n");
        assert_eq!(
            (lab.end, lab.reached().as_str()),
            (Some(End::ClientProtocol), "")
        );
    }
}

#[test]
fn endless_lines_and_junk_end_in_421() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.sends(vec![b'a'; 1 << 20]);
    assert_eq!(lab.heard(), "500 5.5.2 Line too long\r\n");
    assert_eq!(lab.end, Some(End::LineTooLong));
    assert_eq!(lab.session.facts().ended_in, Some(Phase::Command));
    assert!(lab.backlog.is_empty() && lab.reached().is_empty());

    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.sends("\u{1}\u{2}\r\n".repeat(1000));
    let heard = lab.heard();
    assert!(heard.ends_with("421 4.7.0 Too many errors\r\n"));
    assert!(heard.lines().count() < 30);
    assert_eq!(lab.end, Some(End::TooManyErrors));

    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.sends(vec![b'\n'; MAX_COMMAND + 1]);
    assert_eq!(lab.end, Some(End::LineTooLong));
}

#[test]
fn floods_are_bounded() {
    let mut lab = Lab::greeted(ClientSecurity::None);
    for _ in 0..1000 {
        lab.sends("NOOP\r\n");
        lab.says("250 ok\r\n");
        if lab.end.is_some() {
            break;
        }
    }
    assert_eq!(lab.end, Some(End::TooManyErrors));
    assert!(lab.heard().ends_with("421 4.7.0 Too many errors\r\n"));

    // What delivers nothing, with the most of it that is borne.
    let [small, large] = [1023, 1024].map(|size| format!("BDAT {size}\r\n{}", "x".repeat(size)));
    for (client, member, most) in [
        ("BDAT 0\r\n", "250 ok\r\n", 98),
        ("BDAT 1\r\nx", "250 ok\r\n", 98),
        (&small, "250 ok\r\n", 98),
        (&large, "503 no mail\r\n", 201),
        (&large, "452 no space\r\n", 201),
        ("RCPT TO:<c@d>\r\n", "450 later\r\n", 1001),
        ("RCPT TO:<c@d>\r\n", "550 nobody\r\n", 201),
        ("DATA\r\n", "554 no\r\n", 201),
        ("DATA\r\n", "451 later\r\n", 201),
        ("DATA\r\n", "503 no\r\n", 21),
    ] {
        let mut lab = Lab::greeted(ClientSecurity::None);
        // EHLO and MAIL move no message, either.
        lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
        let mut borne = 0;
        while lab.end.is_none() && borne < 2000 {
            lab.sends(client);
            if lab.end.is_none() {
                lab.says(member);
                borne += 1;
            }
        }
        assert_eq!(
            (lab.end, borne),
            (Some(End::TooManyErrors), most),
            "{client:?}, {member:?}"
        );
    }

    // Large chunks are progress, and so is a message that the member accepts.
    let mut lab = Lab::greeted(ClientSecurity::None);
    for _ in 0..3 {
        lab.exchange("MAIL FROM:<a@b>\r\n", "250 ok\r\n");
        for _ in 0..200 {
            lab.exchange(&large, "250 ok\r\n");
        }
        for _ in 0..95 {
            lab.exchange("BDAT 1\r\nx", "250 ok\r\n");
        }
        lab.exchange("BDAT 1 LAST\r\nx", "250 taken\r\n");
    }
    assert_eq!(lab.end, None);

    // Pipelined: what the queue does not hold stays with the client.
    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.sends("RCPT TO:<a@b>\r\n".repeat(10_000));
    assert_eq!(
        lab.reached().lines().count(),
        crate::smtp::session::MAX_QUEUE
    );
}

#[test]
fn a_client_hello_in_clear_is_closed_without_a_word() {
    let hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    for security in [ClientSecurity::None, REQUIRE, ALLOW] {
        let mut lab = Lab::new(security);
        lab.sends(hello);
        assert_eq!(
            (lab.end, lab.heard().as_str()),
            (Some(End::ClientHelloInClear), "")
        );
        assert_eq!(lab.reached(), "");
        // Before the member has spoken.
        let mut lab = Lab::silent(security);
        lab.sends(hello);
        assert_eq!(
            (lab.end, lab.heard().as_str()),
            (Some(End::ClientHelloInClear), "")
        );
    }
}

#[test]
fn every_wait_has_an_end() {
    let limits = Timeouts::DEFAULT;
    let second = Duration::from_secs(1);

    let mut lab = Lab::new(ClientSecurity::None);
    lab.wait(limits.command - second);
    lab.sends("N");
    assert_eq!(lab.end, None);
    lab.wait(second);
    assert_eq!(lab.heard(), "421 4.4.2 Timeout exceeded\r\n");
    assert_eq!(lab.end, Some(End::CommandTimeout));

    let mut lab = Lab::silent(ClientSecurity::None);
    lab.wait(limits.greeting);
    assert_eq!((lab.connects, lab.end), (2, None));

    let mut lab = Lab::greeted(ClientSecurity::None);
    lab.sends("MAIL FROM:<a@b>\r\n");
    lab.wait(limits.reply);
    assert!(lab.heard().starts_with("421 4.4.2 "));
    assert_eq!(lab.end, Some(End::MemberTimeout));

    // A byte now and then is no progress.
    let mut lab = in_data(ClientSecurity::None);
    for _ in 0..30 {
        lab.sends("x");
        lab.wait(Duration::from_secs(10));
    }
    assert_eq!((lab.end, lab.aborted), (Some(End::DataTimeout), true));

    // A slow but honest client.
    let mut lab = in_data(ClientSecurity::None);
    for _ in 0..30 {
        lab.sends(vec![b'x'; 2000]);
        lab.wait(limits.data_block - second);
    }
    assert_eq!(lab.end, None);
}
