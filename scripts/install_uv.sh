# Sourced by demo.sh and test.sh: puts `uv` on the PATH, installing it below .cache/ where it is missing.
if ! command -v uv >/dev/null; then
  export PATH="$PWD/.cache/uv/bin:$PATH"
  if ! command -v uv >/dev/null; then
    echo "installing uv …" >&2
    if python3 -m venv .cache/uv 2>/dev/null; then
      .cache/uv/bin/pip install --quiet --disable-pip-version-check uv
    elif command -v curl >/dev/null; then
      curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$PWD/.cache/uv/bin" UV_NO_MODIFY_PATH=1 sh
    else
      echo "uv is missing, and neither python3-venv nor curl is there to install it: see https://docs.astral.sh/uv" >&2
      exit 1
    fi
  fi
fi
