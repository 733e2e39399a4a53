// Package merkle is kmo1: what bytes are, as SHA-3 Merkle roots.
//
// An OCI registry names bytes by sha256. A kmo1 root stands beside that name, is computed in the same pass, and must match
// as well. Unlike one hash over all bytes it lets a single chunk of a blob be checked as soon as that chunk has arrived.
//
// # Format
//
// H is SHA3-256, n = 32. A chunk is 65 536 bytes; the last one of a blob may be shorter, and an empty blob has one empty chunk. u16, u32 and
// u64 are big-endian; s16(b) is u16(len b) ‖ b. Every hash starts with eight bytes, one Keccak lane:
//
//	P(level, type) = 6b 4d 4f 6d 31 ‖ n ‖ level ‖ type          "kMOm1", n, then
//	level            0 chunks of a blob, 1 blobs of a manifest, 2 manifests of an index, 3 files of a tree
//	type             0 leaf, 1 node, 2 head
//
//	leaf(l, x)     = H(P(l,0) ‖ x)
//	node(l, a, b)  = H(P(l,1) ‖ a ‖ b)
//	MTH(l, h[0…m)) = h[0] if m = 1, else node(l, MTH(h[0…k)), MTH(h[k…m))), k the largest power of two below m
//
//	blobRoot(D)    = H(P(0,2) ‖ u64(|D|) ‖ u32(65536) ‖ MTH(0, leaves))          leaf x: one chunk
//	manifestRoot   = H(P(1,2) ‖ u64(count) ‖ MTH(1, leaves))                     leaf x: one blob, as below
//	indexRoot      = H(P(2,2) ‖ u64(count) ‖ MTH(2, leaves))                     leaf x: one manifest, as below
//	contentRoot    = H(P(3,2) ‖ u64(count) ‖ MTH(3, leaves))                     leaf x: one entry, as below
//
// The shape is RFC 9162's: a lone last node moves up, it is never doubled. The head binds count and size, which RFC 9162's
// own roots do not; a verifier takes them from the head only.
//
// A blob in a manifest, in the order manifest bytes, config, layers:
//
//	role u8 (1 manifest, 2 config, 3 layer) ‖ u64(size) ‖ s16(mediaType) ‖ s16("sha256:…") ‖ blobRoot ‖ s16(contentRoot, 32 bytes, or empty)
//
// A member of an index, the index's own bytes first, then all of its manifests in the order of their array:
//
//	role u8 (0 index, 4 manifest, 5 nested index) ‖ u64(size) ‖ s16(mediaType) ‖ s16("sha256:…") ‖ s16("os/arch[/variant][:os.version]") ‖ root
//
// An entry of a tree, sorted bytewise by path:
//
//	type u8 ‖ s16(path) ‖ u32 mode ‖ u32 uid ‖ u32 gid ‖ u64 size ‖ s16(link) ‖ u32 major ‖ u32 minor ‖ u16 nx ‖ nx × (s16 name ‖ s16 value) ‖ blobRoot if a file
//
// with the types f file, d folder, l symbolic link, h hard link, c and b devices, p pipe, w whiteout, o opaque folder; mode is the lower twelve
// bits of a Unix mode. Times are not part of it. The root folder itself has no entry. A folder of a site has uid = gid = 0 throughout, mode 0755
// for folders and executable files, 0644 for other files.
//
// A path is UTF-8, relative and clean, at most 4096 bytes, without control characters; each is there once, and only below folders. In a folder of
// a site no path has a backslash and no two are equal under case folding: sites are checked out on laptops. Images are unpacked on Linux, where
// both are plain names that real images have.
//
// The text form of a root is "kmo1:sha3-256:" and 64 lower-case hex digits.
//
// # Example
//
//	blob := merkle.NewBlob()
//	if _, err := io.Copy(blob, file); err != nil { … }
//	if got := blob.Root(); got != want {
//		return &merkle.MismatchError{Name: file.Name(), Got: got, Want: want}
//	}
package merkle
