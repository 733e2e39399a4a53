package cli

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/term"

	"github.com/kindos/kmo/policy/trust/signature"
)

// WriteNew writes a file that must not be there yet.
func WriteNew(path string, data []byte, mode fs.FileMode) error {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	return errors.Join(err, file.Close())
}

// PublicKey reads a public key from its own file or from its private key's; an OpenPGP one, from what `gpg --export` writes.
func PublicKey(path string) (ssh.PublicKey, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if public, _, _, _, err := ssh.ParseAuthorizedKey(text); err == nil {
		return public, signature.AllowedKey(public)
	}
	if len(text) > 0 && text[0] >= 0x80 || bytes.HasPrefix(text, []byte("-----BEGIN PGP PUBLIC KEY")) {
		return signature.ReadCertificate(text)
	}
	signer, err := signature.LoadKey(path, askPassphrase(path))
	if err != nil {
		return nil, err
	}
	return signer.PublicKey(), nil
}

// askPassphrase asks on the terminal.
func askPassphrase(path string) func() ([]byte, error) {
	return func() ([]byte, error) {
		terminal, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
		if err != nil {
			return nil, errors.New("there is no terminal to ask on; use ssh-agent")
		}
		defer func() { _ = terminal.Close() }()
		_, _ = fmt.Fprintf(terminal, "Passphrase for %s: ", path)
		defer func() { _, _ = fmt.Fprintln(terminal) }()
		return term.ReadPassword(int(terminal.Fd()))
	}
}

// Signer is the key that signs, and what ends its use: a private key file, or with a public key file or none, the ssh-agent's.
func Signer(path string) (ssh.Signer, func() error, error) {
	nothing := func() error { return nil }
	id := ""
	if path != "" {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, nothing, err
		}
		public, _, _, _, err := ssh.ParseAuthorizedKey(text)
		if err != nil {
			signer, err := signature.LoadKey(path, askPassphrase(path))
			return signer, nothing, err
		}
		id = signature.KeyID(public)
	}
	agent, err := signature.DialAgent("")
	if err != nil {
		return nil, nothing, err
	}
	signer, err := agent.Signer(id)
	return signer, agent.Close, err
}

// Authorized is the line of a public key, as its file has it.
func Authorized(key ssh.PublicKey) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

// PrivateKey reads a private key file. A statement is signed with the key itself, which an ssh-agent never gives out.
func PrivateKey(path string) (crypto.Signer, error) {
	if path == "" {
		return nil, Usagef("this needs --key FILE: the private key that signs")
	}
	return signature.LoadPrivateKey(path, askPassphrase(path))
}
